"""What the driver tells the tracker while ranks train."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

from codec_dist.tracking import Tracker
from codec_dist.training.notes import Note
from codec_dist.training.progress import ranks_count, read_progress
from codec_dist.training.sae_runs import runs_apart
from codec_dist.training.spool import unheard_notes
from codec_dist.training.task import TrainingTask

TOP_MODE_COLUMNS = ("epoch", "layer", "quantity", "architecture", "mode", "class", "correlation", "frequency", "hoyer")
OVERVIEW = ("ev", "l0", "dead_fraction")


@contextmanager
def training_log(task: TrainingTask) -> Iterator["Logbook"]:
    """The tracker of a training for the length of a block, which is how the training ends for the tracker, too.

    The driver has it, not a rank: so whatever ends the ranks (Ctrl-C, SIGTERM, a crash, a node that is gone), the W&B
    run is closed and says how it ended. At the end of the block what the ranks have left is logged.
    """
    with Tracker(task.directory, task.tracking, stage="train", group=task.name, config=_settings(task)) as tracker:
        logbook = Logbook(tracker, task.scratch, apart=runs_apart(task.tracking, task.jobs))
        try:
            yield logbook
        except BaseException:
            with suppress(Exception):  # what ended the block is the error to show
                logbook.catch_up()
            raise
        logbook.catch_up()


class Logbook:
    """Evaluations for the tracker.

    Args:
        tracker: the training's.
        scratch: folder in which the ranks leave notes and progress.
        apart: whether every SAE gets a W&B run of its own when training ends. Then the training's own W&B run
            shows an overview while it goes on, since names for every SAE of a sweep would be too many.
    """

    def __init__(self, tracker: Tracker, scratch: Path, *, apart: bool = False) -> None:
        self._tracker, self._scratch, self._apart = tracker, scratch, apart
        # When progress was last looked at, and how many epochs were done.
        self._looked: tuple[float, int] | None = None

    def catch_up(self) -> None:
        """Log what the ranks have left since the last call."""
        if self._looked is None and ranks_count(self._scratch):
            self._looked = (time.monotonic(), read_progress(self._scratch))
        for notes in unheard_notes(self._scratch):
            self.enter(notes)

    def enter(self, notes: Sequence[Note]) -> None:
        """Log evaluations of SAEs that advance together.

        The numbers and histograms of each; then what they have in common: a table of the modes that correlate
        most with a class, how fast the training goes, and an overview where SAEs have runs apart.
        """
        if not notes:
            return
        for note in notes:
            self._enter_numbers(note)
        epoch = max(note.epoch for note in notes)
        rows = [
            [note.epoch, note.layer, note.quantity, note.architecture, *mode]
            for note in notes
            for mode in note.top_modes
        ]
        if rows:
            self._tracker.table("top_modes", list(TOP_MODE_COLUMNS), rows)
        self._log_speed(epoch)
        if self._apart:
            self._tracker.log(_overview(notes), step=epoch, axis="epoch")

    def _enter_numbers(self, note: Note) -> None:
        # In metrics.jsonl alone, names may be as long as it takes to be unique.
        prefix = note.folder if self._apart else note.label
        named = {f"{prefix}/{name}": value for name, value in note.numbers.items()}
        self._tracker.log(named, step=note.epoch, axis="epoch", journal_only=self._apart)
        for name, values in note.histograms.items():
            self._tracker.histogram(f"{prefix}/{name}", values, step=note.epoch, axis="epoch", journal_only=self._apart)

    def _log_speed(self, epoch: int) -> None:
        now, done = time.monotonic(), read_progress(self._scratch)
        before, done_before = self._looked or (now, done)
        if done > done_before:
            speed = (done - done_before) / max(now - before, 1e-9)
            self._tracker.log({"sae_epochs_per_second": speed}, step=epoch, axis="epoch")
        self._looked = now, done


def _settings(task: TrainingTask) -> dict[str, Any]:
    saes = {job.label: {"options": dict(job.options), **job.settings.model_dump(mode="json")} for job in task.jobs}
    return {"seed": task.seed, "saes": saes}


def _overview(notes: Sequence[Note]) -> dict[str, float]:
    """The highest explained variance and the medians, for each layer and quantity."""
    by_key: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        by_key.setdefault((note.layer, note.quantity), []).append(note)
    found: dict[str, Any] = {}
    for (layer, quantity), group in by_key.items():
        for name in OVERVIEW:
            if values := [note.numbers[name] for note in group if name in note.numbers]:
                found[f"{layer}/{quantity}/median_{name}"] = float(median(values))
                if name == "ev":
                    found[f"{layer}/{quantity}/highest_ev"] = float(max(values))
    return found
