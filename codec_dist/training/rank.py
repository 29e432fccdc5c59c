"""What one rank does: all bundles, one after the other."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from codec_dist.store import ContributionStore
from codec_dist.tracking import Tracker
from codec_dist.training.bundle_training import BundleTraining
from codec_dist.training.bundles import Bundle, make_bundles
from codec_dist.training.logbook import Logbook
from codec_dist.training.memory import bytes_for_rows, keep_freed_memory
from codec_dist.training.parts import read_parts
from codec_dist.training.plan import is_finished
from codec_dist.training.ranks import Ranks
from codec_dist.training.resume import epochs_done
from codec_dist.training.rows import LayerRows
from codec_dist.training.task import TrainingTask


def train_on_rank(task: TrainingTask, ranks: Ranks, after_bundle: Callable[[], None] = lambda: None) -> None:
    """Train the SAEs of ``task`` that are not finished, together with the other ranks.

    ``after_bundle`` is called by every rank equally often.

    Raises:
        TrainingError, StoreError, SaeError: rows that cannot be read or decomposed, or training that fails.
    """
    keep_freed_memory()
    store = ContributionStore(task.store_path)
    parts = read_parts(store, task.split_path)
    dtype = getattr(torch, task.dtype)
    # Rank 0 decides, because files may change between two looks at them.
    unfinished = ranks.from_first([job for job in task.jobs if not is_finished(task.folder(job))])
    first_epochs = ranks.from_first([epochs_done(task.folder(job)) for job in unfinished])
    rows = {
        job.key: LayerRows(store, job.layer, job.quantity, parts, ranks, dtype=dtype, window_bytes=task.window_bytes)
        for job in unfinished
    }
    budget = task.bytes_for_rows if task.bytes_for_rows is not None else bytes_for_rows(ranks)
    bundles = make_bundles(unfinished, first_epochs, {key: one.bytes for key, one in rows.items()}, budget)
    with _logbook(task, ranks) as logbook:
        if logbook:
            logbook.advance(sum(first_epochs))
        for bundle in bundles:
            _make_room(rows, bundle, budget)
            training = BundleTraining(task, bundle, [rows[job.key] for job in bundle.jobs], parts, ranks, logbook)
            training.run(logbook.advance if logbook else _ignore)
            if logbook:
                logbook.show_progress()
            after_bundle()


def _make_room(rows: Mapping[tuple[str, str], LayerRows], bundle: Bundle, budget: int) -> None:
    """Load what the bundle needs; first unload the rest if both do not fit."""
    needed = set(bundle.keys) if bundle.resident else set()
    held = {key for key, one in rows.items() if one.resident}
    if sum(rows[key].bytes for key in held | needed) > budget or not bundle.resident:
        for key in held - needed:
            rows[key].unload()
    for key in needed:
        rows[key].load()


def _logbook(task: TrainingTask, ranks: Ranks) -> AbstractContextManager[Logbook | None]:
    return nullcontext() if ranks.rank else _TrackedLogbook(task)


class _TrackedLogbook:
    """Rank 0's logbook for the length of a ``with`` block."""

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._tracker = Tracker(task.directory, task.tracking, stage="train", group=task.name, config=_settings(task))

    def __enter__(self) -> Logbook:
        return Logbook(self._tracker.__enter__(), self._task.scratch)

    def __exit__(self, *error: Any) -> None:
        self._tracker.__exit__(*error)


def _settings(task: TrainingTask) -> dict[str, Any]:
    saes = {job.label: {"options": dict(job.options), **job.settings.model_dump(mode="json")} for job in task.jobs}
    return {"seed": task.seed, "saes": saes}


def _ignore(_: int) -> None:
    """Ranks other than the first report no progress."""
