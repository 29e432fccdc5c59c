"""What rank 0 tells the tracker and the person who waits."""

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from codec_dist.tracking import Tracker
from codec_dist.training.notes import Note
from codec_dist.training.progress import EpochCount, read_progress

TOP_MODE_COLUMNS = ("epoch", "layer", "quantity", "architecture", "mode", "class", "correlation", "frequency", "hoyer")
OVERVIEW = ("ev", "l0", "dead_fraction")


class Logbook:
    """Evaluations for the tracker, and rank 0's part of the progress.

    Args:
        tracker: the training's.
        scratch: folder of the progress files.
        done: epochs of all SAEs that were done before.
        apart: whether every SAE gets a W&B run of its own when training ends. Then the training's own W&B run
            shows an overview while it goes on, since names for every SAE of a sweep would be too many.
    """

    def __init__(self, tracker: Tracker, scratch: Path, done: int = 0, *, apart: bool = False) -> None:
        self._tracker, self._scratch, self._apart = tracker, scratch, apart
        self.epochs = EpochCount(scratch, 0, done)
        self._looked = (time.monotonic(), read_progress(scratch))

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
        self.epochs.show()
        now, done, (before, done_before) = time.monotonic(), read_progress(self._scratch), self._looked
        if done > done_before:
            speed = (done - done_before) / max(now - before, 1e-9)
            self._tracker.log({"sae_epochs_per_second": speed}, step=epoch, axis="epoch")
        self._looked = now, done


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
