"""Map-reduce over a contribution store: what one worker computes of some shards, and what follows from the sum.

::

    inputs = FoldInputs(store, split, classes=len(names))
    parts = (summarize_shards(inputs, task, shards) for shards in groups)      # anywhere, in any order
    entries = finish_summary(inputs, task, functools.reduce(lambda a, b: a.merge(b), parts), names, threshold)
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from codec_dist.modes.errors import ModesError
from codec_dist.modes.layer_modes import CHANNEL, MODE, LayerModes
from codec_dist.modes.layer_summary import EVALUATE, LayerSummary, PartCorrelations, TopLoadings, part_codes
from codec_dist.modes.stability import read_stability
from codec_dist.sae import SparseAutoencoder
from codec_dist.statistics import LayerStatistics, hoyer
from codec_dist.store import ContributionStore, samples_version

KINDS = ("contribution", "activation")


@dataclass(frozen=True)
class FoldInputs:
    """What all workers read."""

    store: str | Path
    """Folder or URL."""
    split: Path
    classes: int
    """Number of classes; 0 where nothing is labelled."""
    images: int = 10
    """Top images kept per mode."""


@dataclass(frozen=True)
class SummaryTask:
    """One quantity of one layer, with the SAE that decomposes it (None: raw channels only)."""

    layer: str
    quantity: str
    sae: Path | None = None


def summary_tasks(sae_directory: Path, selected: Mapping[str, Mapping[str, str]]) -> list[SummaryTask]:
    """A task for each SAE of ``sae/selected.json``: {layer key: {quantity: folder below ``sae_directory``}}."""
    return [
        SummaryTask(layer, quantity, Path(sae_directory) / folder)
        for layer, quantities in selected.items()
        for quantity, folder in quantities.items()
    ]


def statistics_kinds(store: ContributionStore) -> list[str]:
    """Which of ``contribution`` and ``activation`` the store holds with both signs."""
    return [kind for kind in KINDS if {f"{kind}-positive", f"{kind}-negative"} <= set(store.quantities)]


def summarize_shards(inputs: FoldInputs, task: SummaryTask, shards: Sequence[int] | None = None) -> LayerSummary:
    """Fold the blocks of some shards (numbers; default: all) of one task.

    Raises:
        ModesError: an SAE of another number of channels, a label that is no class, samples without a part.
    """
    store, samples = _open(inputs)
    channels = store.width(task.layer, task.quantity)
    sae = None if task.sae is None else _load_sae(task, channels)
    summary = LayerSummary(channels, None if sae is None else sae.modes, inputs.classes, inputs.images)
    for block in store.blocks(task.layer, task.quantity, shards):
        rows, inside = torch.from_numpy(np.asarray(block.values)), slice(block.start, block.start + len(block.values))
        numbers = torch.arange(inside.start, inside.stop)
        summary.update(rows, samples.labels[inside], samples.parts[inside], numbers, sae)
    return summary


def measure_shards(inputs: FoldInputs, layer: str, kind: str, shards: Sequence[int] | None = None) -> LayerStatistics:
    """Fold the *evaluate* rows of some shards into the statistics of a layer.

    Args:
        inputs: what all workers read.
        layer: layer key.
        kind: ``contribution`` or ``activation`` (``contribution[TARGET]`` where there are several targets).
        shards: shard numbers; default: all.

    Raises:
        ModesError: samples without a part.
        StatisticsError: a label that is no class.
    """
    store, samples = _open(inputs)
    statistics = LayerStatistics(store.layers[layer], inputs.classes)
    signs = (store.blocks(layer, f"{kind}-{sign}", shards) for sign in ("positive", "negative"))
    for positive, negative in zip(*signs, strict=True):
        inside = slice(positive.start, positive.start + len(positive.values))
        evaluate = samples.parts[inside] == EVALUATE
        first, second = (torch.from_numpy(np.asarray(block.values))[evaluate] for block in (positive, negative))
        statistics.update(first, second, samples.labels[inside][evaluate])
    return statistics


def finish_summary(
    inputs: FoldInputs,
    task: SummaryTask,
    summary: LayerSummary,
    class_names: Sequence[str],
    threshold: float,
    concepts: Mapping[str, tuple[int, ...]] | None = None,
) -> Iterator[LayerModes]:
    """The summaries of the modes (where there is an SAE) and of the raw channels, from the fold of all shards."""

    def entry(unit: str, correlations: PartCorrelations, **more: object) -> LayerModes:
        select, evaluate = correlations.result()
        fixed = {"threshold": threshold, "class_names": tuple(class_names), "concepts": dict(concepts or {})}
        return LayerModes(task.layer, task.quantity, unit, select, evaluate, **fixed, **more)  # type: ignore[arg-type]

    if summary.modes is not None and task.sae is not None:
        store, _ = _open(inputs)
        more = {
            "hoyer": hoyer(SparseAutoencoder.load(task.sae).dictionary.cpu()),
            "stability": read_stability(task.sae),
        }
        yield entry(MODE, summary.modes, top_images=_image_table(store.samples, summary.top_images()), **more)
    yield entry(CHANNEL, summary.channels)


@dataclass(frozen=True, eq=False)
class _Samples:
    labels: Int[Tensor, "samples"]
    parts: Int8[Tensor, "samples"]


def _open(inputs: FoldInputs) -> tuple[ContributionStore, _Samples]:
    """The store and its samples' labels and parts; read once per process, again when the files change."""
    samples = samples_version(inputs.store)
    missing = inputs.split if not inputs.split.exists() else f"{inputs.store}/samples.parquet" if not samples else None
    if missing is not None:
        raise ModesError(f"there is no {missing}: run the stages `prepare` and `extract` first")
    return _open_unchanged(inputs.store, inputs.split, (inputs.split.stat().st_mtime_ns, samples))


@functools.lru_cache(maxsize=2)
def _open_unchanged(path: str | Path, split: Path, changed: tuple[object, ...]) -> tuple[ContributionStore, _Samples]:
    store = ContributionStore(path)
    labels = store.samples["label"].fill_null(-1).to_numpy().astype(np.int64)
    return store, _Samples(torch.from_numpy(labels), assign_parts(store.samples, pq.read_table(split)))


def assign_parts(samples: pa.Table, split: pa.Table) -> Int8[Tensor, "samples"]:
    """The part of each sample, as an index into ``PARTS``, by its shard and key.

    Raises:
        ModesError: a sample that the split does not list, or lists twice.
    """
    by = ["shard", "key"]
    numbered = samples.select(by).append_column("number", pa.array(np.arange(len(samples))))
    joined = numbered.join(split.select([*by, "part"]), by, join_type="left outer").sort_by("number")
    if len(joined) != len(samples):
        raise ModesError(f"the split lists {len(joined) - len(samples)} samples more than once: make it again")
    codes = part_codes(joined["part"].to_numpy(zero_copy_only=False))
    missing = (codes < 0).nonzero()
    if len(missing):
        key = joined["key"][int(missing[0])].as_py()
        raise ModesError(
            f"{len(missing)} of {len(samples)} stored samples (the first is {key!r}) are in no part of the split: "
            "it was made for other shards; make it again"
        )
    return codes


def _load_sae(task: SummaryTask, channels: int) -> SparseAutoencoder:
    sae = SparseAutoencoder.load(task.sae)  # type: ignore[arg-type]
    if sae.channels != channels:
        raise ModesError(
            f"the SAE in {task.sae} decomposes {sae.channels} channels, {task.layer} has {channels}: train it again"
        )
    return sae


def _image_table(samples: pa.Table, top: TopLoadings) -> pa.Table:
    loading_samples = samples.select(["shard", "key", "label"]).take(pa.array(top.sample))
    columns = {"mode": pa.array(top.mode), "rank": pa.array(top.rank)}
    columns |= {name: loading_samples[name] for name in loading_samples.column_names}
    return pa.table(columns | {"loading": pa.array(top.loading)})
