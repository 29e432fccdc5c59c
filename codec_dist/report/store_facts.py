"""What the contribution store tells about the images: how many, how well answered, how complete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.report.errors import ReportError
from codec_dist.store import ContributionStore

RESIDUAL = "completeness."
SMALLEST_CHANGE = 1e-3


@dataclass(frozen=True)
class Residual:
    """Completeness at one layer: |Σ C − (T(x) − T(x₀))| relative to max(|ΔT|, 10⁻³ · median |ΔT|)."""

    layer: str
    median: float
    quartiles: tuple[float, float]
    percentile_90: float
    absolute: float
    """Median |Σ C − ΔT|, in units of the target."""
    change: float
    """Median |ΔT|, in units of the target."""
    images: int


@dataclass(frozen=True)
class StoreFacts:
    """A summary of a store's samples and ledger."""

    layers: Mapping[str, int]
    """Layer key → channels."""
    identity: Mapping[str, Any]
    identity_hash: str
    targets: Sequence[str]
    quantities: Sequence[str]
    images: int
    """Images that are stored."""
    parts: Mapping[str, int]
    """Images by part of the split."""
    labelled: int
    has_split: bool
    """Whether parts are known; without, measures are over all stored images instead of *evaluate*."""
    measured: int
    """Images of *evaluate*, over which measures are."""
    measured_labelled: int
    """Those of them that have a label."""
    accuracy: float | None
    """Of the model on labelled images of *evaluate*; None where there are none, or no split."""
    residuals: Sequence[Residual]
    """Over the images of *evaluate*."""
    shards: int
    shards_done: int
    dropped: Sequence[tuple[str, str, str]]
    """Shard, key and reason of every image that is not stored."""
    pending: Sequence[str]
    """Names of the shards that are not done."""
    seconds: float
    """Sum of the times that shards took."""
    bytes: int


def read_store_facts(location: str | Path, run: Path, with_split: bool = True) -> StoreFacts:
    """The facts of a run's store.

    Args:
        location: folder or URL of the store.
        run: the run's folder.
        with_split: whether RUN/split.parquet, where there is one, counts.

    Raises:
        ReportError: a split that cannot be read.
        StoreError: a store that cannot be read.
    """
    store = ContributionStore(location)
    samples, info, markers = store.samples, store.info(), store.markers
    split = run / "split.parquet"
    has_split = with_split and split.exists()
    parts = _parts(split, samples) if has_split else np.full(len(samples), "", dtype=object)
    measured = samples.filter(pa.array(parts == "evaluate", pa.bool_())) if has_split else samples
    labels = samples["label"]
    names = [name for name, _ in store.shards]
    return StoreFacts(
        layers=store.layers,
        identity=store.identity,
        identity_hash=store.identity_hash,
        targets=store.targets,
        quantities=store.quantities,
        images=len(samples),
        parts={name: int((parts == name).sum()) for name in ("fit", "select", "evaluate") if (parts == name).any()},
        labelled=len(labels) - labels.null_count,
        has_split=has_split,
        measured=len(measured),
        measured_labelled=len(measured) - measured["label"].null_count,
        accuracy=_accuracy(measured) if has_split else None,
        residuals=_residuals(measured, list(store.layers)),
        shards=info.shards,
        shards_done=info.shards_done,
        dropped=[(marker.shard, key, reason) for marker in markers.values() for key, reason in marker.dropped],
        pending=[name for number, name in enumerate(names) if number not in markers],
        seconds=info.seconds,
        bytes=info.bytes,
    )


def _parts(path: Path, samples: pa.Table) -> np.ndarray:
    """The part of each sample; empty text for one that the split does not know."""
    try:
        split = pq.read_table(path, columns=["shard", "key", "part"], partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"cannot read {path} ({error}): remove it and run the stages again") from error
    split = split.cast(pa.schema([(name, pa.string()) for name in ("shard", "key", "part")]))
    rows = samples.select(["shard", "key"]).append_column("row", pa.array(np.arange(len(samples))))
    joined = rows.join(split, keys=["shard", "key"], join_type="left outer").sort_by("row")
    if len(joined) != len(samples):
        raise ReportError(f"{path} lists samples more than once: remove it and run the stages again")
    parts: np.ndarray = joined["part"].fill_null("").to_numpy(zero_copy_only=False)
    return parts


def _accuracy(samples: pa.Table) -> float | None:
    labelled = samples.filter(pc.is_valid(samples["label"]))
    if not len(labelled):
        return None
    right: float = pc.mean(pc.equal(labelled["label"], labelled["prediction"])).as_py()
    return right


def _residuals(samples: pa.Table, layers: Sequence[str]) -> list[Residual]:
    change = np.abs(samples["target_value"].to_numpy() - samples["baseline_value"].to_numpy())
    found = []
    for layer in layers:
        if RESIDUAL + layer not in samples.column_names:
            continue
        residual = np.abs(samples[RESIDUAL + layer].to_numpy().astype(np.float64))
        known = np.isfinite(residual) & np.isfinite(change)
        if not known.any():
            continue
        floor = SMALLEST_CHANGE * float(np.median(change[known]))
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = residual[known] / np.maximum(change[known], floor)
        relative = relative[np.isfinite(relative)]
        if len(relative):
            low, median, high, most = (float(value) for value in np.percentile(relative, [25, 50, 75, 90]))
            absolute, typical = (float(np.median(values[known])) for values in (residual, change))
            found.append(Residual(layer, median, (low, high), most, absolute, typical, len(relative)))
    return found
