"""The stage `summarize`: folds over the store on Ray, from which the mode summary and the statistics are written."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from codec_dist.cluster_runtime import map_fold
from codec_dist.config import Config
from codec_dist.modes import (
    FoldInputs,
    LayerModes,
    SummaryWriter,
    finish_summary,
    load_concepts,
    measure_shards,
    statistics_kinds,
    summarize_shards,
    summary_tasks,
    write_statistics,
)
from codec_dist.pipeline.inputs import StageInputs
from codec_dist.pipeline.preparing import class_names
from codec_dist.pipeline.selected_saes import selected_saes
from codec_dist.pipeline.stage import StageContext
from codec_dist.store import ContributionStore
from codec_dist.tracking import Tracker
from codec_dist.utils import Progress

T = TypeVar("T")

SHARDS_PER_TASK = 16
LOGGED_MODES = 20


def check_summary(inputs: StageInputs) -> None:
    """Refuse concepts that cannot be read, or that name classes which there are not.

    Raises:
        ModesError, PipelineError: with the file and the class.
    """
    _read_names(inputs.config)


def summarize(context: StageContext) -> dict[str, Any]:
    """Write ``modes/``: one pass over the store per SAE, and one per layer for the statistics."""
    config, run = context.config, context.run
    names, concepts = _read_names(config)
    store = ContributionStore(run.store)
    tasks = summary_tasks(run.sae, selected_saes(run))
    groups = _groups(store.shard_numbers)
    inputs = FoldInputs(run.store, run.split, len(names), images=config.visualization.images)
    kinds = statistics_kinds(store)
    entries: list[LayerModes] = []
    total = (len(tasks) + len(store.layers) * len(kinds)) * len(groups)
    with context.ray(), Progress("summarize", total=total, unit="folds") as progress:
        with SummaryWriter(run.modes) as writer:
            for task in tasks:
                summary = map_fold(groups, functools.partial(summarize_shards, inputs, task), progress=progress)
                for entry in finish_summary(inputs, task, summary, names, config.modes.correlation_threshold, concepts):
                    writer.add(entry)
                    if entry.unit == "mode":
                        entries.append(entry)
        statistics = {}
        for layer in store.layers:
            for kind in kinds:
                fold = functools.partial(_measure, inputs, layer, kind)
                statistics[layer, kind] = map_fold(groups, fold, progress=progress).result()
    write_statistics(run.modes, statistics)
    if context.tracker is not None:
        _log(context.tracker, entries)
        context.tracker.artifact(f"{config.run.name}-modes", "summary", run.modes)
    return {"layers": len(store.layers), "modes": sum(len(entry) for entry in entries)}


def _read_names(config: Config) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]] | None]:
    """Names of the classes, and the concepts over them, if there are any."""
    names = class_names(config)
    return names, load_concepts(Path(config.modes.concepts), names) if config.modes.concepts else None


def _measure(inputs: FoldInputs, layer: str, kind: str, shards: Sequence[int]) -> Any:
    return measure_shards(inputs, layer, kind, shards)


def _groups(shards: Sequence[int]) -> list[list[int]]:
    """Shards in groups that are worth a task each, but at least a few tasks where there are few shards."""
    size = max(1, min(SHARDS_PER_TASK, len(shards) // 4))
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def _log(tracker: Tracker, entries: Sequence[LayerModes]) -> None:
    rows: list[list[Any]] = []
    for entry in entries:
        prefix = f"modes/{entry.layer}/{entry.quantity}"
        top = entry.top_correlations()
        tracker.summary(
            {
                f"{prefix}/alive": int(entry.alive.sum()),
                f"{prefix}/class_correlated": int(entry.class_correlated().sum()),
                f"{prefix}/median_top_correlation": float(top[~top.isnan()].median()) if len(top) else float("nan"),
            }
        )
        tracker.histogram(f"{prefix}/top_correlation", top.numpy())
        tracker.histogram(f"{prefix}/frequency", entry.evaluate.frequency.numpy())
        for name in ("hoyer", "stability"):
            if (values := getattr(entry, name)) is not None:
                tracker.histogram(f"{prefix}/{name}", values.numpy())
        rows += _top_rows(entry)
    columns = ["layer", "quantity", "mode", "class", "correlation", "frequency", "mean loading", "stability"]
    tracker.table("modes/top", columns, rows)


def _top_rows(entry: LayerModes) -> list[list[Any]]:
    top = entry.top_correlations()
    order = torch.argsort(top.nan_to_num(-2), descending=True)[:LOGGED_MODES].tolist()
    rows: list[list[Any]] = []
    for mode in order:
        best = entry.top_classes(mode, count=1)
        if best:
            frequency, loading = float(entry.evaluate.frequency[mode]), float(entry.evaluate.mean_when_on[mode])
            stability = float(entry.stability[mode]) if entry.stability is not None else None
            where = [entry.layer, entry.quantity, mode, best[0].name]
            rows.append([*where, best[0].correlation, frequency, loading, stability])
    return rows
