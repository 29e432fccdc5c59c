"""What rank 0 tells the tracker and the person who waits."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from codec_dist.tracking import Tracker
from codec_dist.training.evaluation import Evaluation
from codec_dist.training.plan import SaeJob
from codec_dist.utils import read_json, write_json_atomically

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0
TOP_MODE_COLUMNS = ("epoch", "layer", "quantity", "architecture", "mode", "class", "correlation", "frequency", "hoyer")
OVERVIEW = ("ev", "l0", "dead_fraction")


class Logbook:
    """Evaluations for the tracker, and the number of SAE epochs done in a file that the driver reads.

    Args:
        tracker: the training's.
        scratch: folder of the file.
        apart: whether every SAE gets a W&B run of its own when training ends. Then the training's own W&B run
            shows an overview while it goes on, since names for every SAE of a sweep would be too many.
    """

    def __init__(self, tracker: Tracker, scratch: Path, apart: bool = False) -> None:
        self._tracker, self._path, self._apart = tracker, scratch / PROGRESS_FILE, apart
        self._done, self._written = 0, 0.0
        self._looked = (time.monotonic(), 0)

    def advance(self, sae_epochs: int) -> None:
        """Count epochs of SAEs as done."""
        self._done += sae_epochs
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.show_progress()

    def show_progress(self) -> None:
        """Let the driver know of all epochs counted so far, which ``advance`` does about once a second."""
        self._written = time.monotonic()
        write_json_atomically(self._path, {"done": self._done})

    def evaluation(self, job: SaeJob, epoch: int, numbers: Mapping[str, float], evaluation: Evaluation) -> None:
        """Log the numbers and histograms of one SAE."""
        # In metrics.jsonl alone, names may be as long as it takes to be unique.
        prefix = job.folder.as_posix() if self._apart else job.label
        named = {f"{prefix}/{name}": value for name, value in numbers.items()}
        self._tracker.log(named, step=epoch, axis="epoch", journal_only=self._apart)
        for name, values in evaluation.histograms().items():
            name = f"{prefix}/{name}"
            self._tracker.histogram(name, values.numpy(), step=epoch, axis="epoch", journal_only=self._apart)

    def top_modes(self, epoch: int, evaluations: Mapping[SaeJob, Evaluation]) -> None:
        """Log what all SAEs that advance together have in common.

        A table of the modes that correlate most with a class, how fast the training goes, and an overview
        where SAEs have runs apart.
        """
        rows: list[list[Any]] = []
        for job, evaluation in evaluations.items():
            where = [epoch, job.layer, job.quantity, job.architecture]
            rows += [where + mode for mode in evaluation.top_modes()]
        if rows:
            self._tracker.table("top_modes", list(TOP_MODE_COLUMNS), rows)
        self._log_speed(epoch)
        if self._apart:
            self._tracker.log(_overview(evaluations), step=epoch, axis="epoch")

    def _log_speed(self, epoch: int) -> None:
        now, (before, done) = time.monotonic(), self._looked
        if self._done > done:
            speed = (self._done - done) / max(now - before, 1e-9)
            self._tracker.log({"sae_epochs_per_second": speed}, step=epoch, axis="epoch")
        self._looked = now, self._done


def read_progress(scratch: Path) -> int:
    """SAE epochs that rank 0 has counted so far."""
    try:
        return int(read_json(scratch / PROGRESS_FILE)["done"])
    except (OSError, ValueError, KeyError):
        return 0


def _overview(evaluations: Mapping[SaeJob, Evaluation]) -> dict[str, float]:
    """The highest explained variance and the medians, for each layer and quantity."""
    by_key: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for job, evaluation in evaluations.items():
        by_key.setdefault(job.key, []).append(evaluation.report.numbers())
    found = {}
    for (layer, quantity), reports in by_key.items():
        for name in OVERVIEW:
            values = [report[name] for report in reports if name in report and report[name] == report[name]]
            if values:
                found[f"{layer}/{quantity}/median_{name}"] = float(median(values))
                if name == "ev":
                    found[f"{layer}/{quantity}/highest_ev"] = float(max(values))
    return found
