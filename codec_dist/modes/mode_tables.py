"""The rows of the Parquet files: one function per file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from codec_dist.modes.layer_modes import LayerModes, highest
from codec_dist.statistics import LayerStatisticsResult

_UNIT = [("layer", pa.string()), ("quantity", pa.string()), ("unit", pa.string())]

MODES = pa.schema(
    [
        *_UNIT,
        ("mode", pa.int32()),
        ("alive", pa.bool_()),
        ("frequency", pa.float64()),
        ("mean_loading", pa.float64()),
        ("hoyer", pa.float64()),
        ("stability", pa.float64()),
        ("top_class", pa.int32()),
        ("top_correlation", pa.float64()),
        ("specificity_entropy", pa.float64()),
        ("gini", pa.float64()),
        ("top1_mass", pa.float64()),
        ("top5_mass", pa.float64()),
    ]
)
_BEST = [
    ("best_mode", pa.int32()),
    ("correlation_select", pa.float64()),
    ("correlation", pa.float64()),
    ("modes_above_threshold", pa.int32()),
]
CLASSES = pa.schema([*_UNIT, ("class", pa.int32()), *_BEST])
CONCEPTS = pa.schema([*_UNIT, ("concept", pa.string()), *_BEST])
LAYERS = pa.schema(
    [
        *_UNIT,
        ("modes", pa.int32()),
        ("alive", pa.int32()),
        ("modes_above_threshold", pa.int32()),
        ("median_top_correlation", pa.float64()),
    ]
)
COVERAGE = pa.schema([*_UNIT, ("axis", pa.string()), ("rank", pa.int32()), ("correlation", pa.float64())])
TOP_IMAGES = pa.schema(
    [
        ("layer", pa.string()),
        ("quantity", pa.string()),
        ("mode", pa.int32()),
        ("rank", pa.int32()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("loading", pa.float64()),
    ]
)
STATISTICS = pa.schema(
    [
        ("layer", pa.string()),
        ("quantity", pa.string()),
        ("samples", pa.int64()),
        *((f"hoyer_{name}", pa.float64()) for name in ("mean", "q1", "median", "q3")),
        ("components_95", pa.int32()),
        ("participation_ratio", pa.float64()),
        *((f"ei_{name}", pa.float64()) for name in ("mean", "q1", "median", "q3")),
    ]
)
SUMMARY_SCHEMAS: dict[str, pa.Schema] = {
    "modes": MODES,
    "classes": CLASSES,
    "concepts": CONCEPTS,
    "layers": LAYERS,
    "coverage": COVERAGE,
    "top_images": TOP_IMAGES,
}


def summary_tables(entry: LayerModes) -> dict[str, pa.Table]:
    """What one layer, quantity and unit adds to each file of ``SUMMARY_SCHEMAS``."""
    return {
        "modes": mode_table(entry),
        "classes": class_table(entry),
        "concepts": concept_table(entry),
        "layers": layer_table(entry),
        "coverage": coverage_table(entry),
        "top_images": image_table(entry),
    }


def join_tables(parts: Iterable[Mapping[str, pa.Table]]) -> dict[str, pa.Table]:
    """The tables of several layers as one of each name."""
    parts = list(parts)
    return {
        name: pa.concat_tables([schema.empty_table(), *(part[name] for part in parts)])
        for name, schema in SUMMARY_SCHEMAS.items()
    }


def mode_table(entry: LayerModes) -> pa.Table:
    """One row per mode; from *evaluate*."""
    top_class, top_correlation = highest(entry.correlation.T)
    specificity = entry.specificity()
    return _table(
        MODES,
        entry,
        len(entry),
        mode=np.arange(len(entry)),
        alive=entry.alive,
        frequency=entry.evaluate.frequency,
        mean_loading=entry.evaluate.mean_when_on,
        hoyer=[None] * len(entry) if entry.hoyer is None else entry.hoyer,
        stability=[None] * len(entry) if entry.stability is None else entry.stability,
        top_class=_indices(top_class),
        top_correlation=top_correlation,
        specificity_entropy=specificity.entropy,
        gini=specificity.gini,
        top1_mass=specificity.top1_mass,
        top5_mass=specificity.top5_mass,
    )


def class_table(entry: LayerModes) -> pa.Table:
    """One row per class: its best mode on *select*, judged on *evaluate*."""
    classes = np.arange(len(entry.class_names))
    best = _best(entry.select.correlation, entry.correlation, entry.threshold)
    return _table(CLASSES, entry, len(classes), **{"class": classes}, **best)


def concept_table(entry: LayerModes) -> pa.Table:
    """One row per concept: its best mode on *select*, judged on *evaluate*."""
    names = list(entry.concepts)
    best = _best(*entry.concept_correlations(), entry.threshold)
    return _table(CONCEPTS, entry, len(names), concept=names, **best)


def layer_table(entry: LayerModes) -> pa.Table:
    """One row: the counts; the median is over modes that have a top correlation."""
    top = entry.top_correlations()
    return _table(
        LAYERS,
        entry,
        1,
        modes=[len(entry)],
        alive=[int(entry.alive.sum())],
        modes_above_threshold=[int(entry.class_correlated().sum())],
        median_top_correlation=[float(np.median(known)) if len(known := top[~top.isnan()].numpy()) else None],
    )


def coverage_table(entry: LayerModes) -> pa.Table:
    """The two coverage curves, by rank from 0."""
    curves = entry.coverage()
    ranks = [np.arange(len(curve)) for curve in (curves.by_class, curves.by_mode)]
    axes = ["class"] * len(ranks[0]) + ["mode"] * len(ranks[1])
    values = torch.cat([curves.by_class, curves.by_mode])
    return _table(COVERAGE, entry, len(axes), axis=axes, rank=np.concatenate(ranks), correlation=values)


def image_table(entry: LayerModes) -> pa.Table:
    """The samples of *evaluate* that load highest on each mode."""
    if entry.top_images is None:
        return TOP_IMAGES.empty_table()
    images = entry.top_images
    return _table(TOP_IMAGES, entry, len(images), **{name: images[name] for name in images.column_names})


def statistics_table(results: Mapping[tuple[str, str], LayerStatisticsResult]) -> pa.Table:
    """One row per layer and kind (``contribution`` or ``activation``)."""
    rows = [{"layer": layer, "quantity": kind, **result.numbers()} for (layer, kind), result in results.items()]
    return pa.Table.from_pylist(rows, STATISTICS)


def _best(select: Tensor, evaluate: Tensor, threshold: float) -> dict[str, Any]:
    """Columns about the best mode of each row (a class or concept)."""
    mode, correlation_select = highest(select)
    judged = torch.full((len(mode),), torch.nan, dtype=torch.float64)
    found = mode >= 0
    judged[found] = evaluate[found, mode[found]]
    return {
        "best_mode": _indices(mode),
        "correlation_select": correlation_select,
        "correlation": judged,
        "modes_above_threshold": (evaluate > threshold).sum(dim=1),
    }


def _indices(values: Tensor) -> Sequence[int | None]:
    """Indices with None instead of −1."""
    return [None if value < 0 else value for value in values.tolist()]


def _table(schema: pa.Schema, entry: LayerModes, rows: int, **columns: Any) -> pa.Table:
    """A table of this schema; nan becomes null."""
    same = {"layer": entry.layer, "quantity": entry.quantity, "unit": entry.unit}
    columns |= {name: [same[name]] * rows for name in same if name in schema.names}
    arrays = []
    for field in schema:
        values = columns[field.name]
        if isinstance(values, Tensor):
            values = values.numpy()
        if isinstance(values, pa.ChunkedArray):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values, field.type, from_pandas=True))
    return pa.Table.from_arrays(arrays, schema=schema)
