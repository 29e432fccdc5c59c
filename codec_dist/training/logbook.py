"""What rank 0 tells the tracker and the person who waits."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec_dist.tracking import Tracker
from codec_dist.training.evaluation import Evaluation
from codec_dist.training.plan import SaeJob
from codec_dist.utils import read_json, write_json_atomically

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0
TOP_MODE_COLUMNS = ("epoch", "layer", "quantity", "architecture", "mode", "class", "correlation", "frequency", "hoyer")


class Logbook:
    """Evaluations for the tracker, and the number of SAE epochs done in a file that the driver reads."""

    def __init__(self, tracker: Tracker, scratch: Path) -> None:
        self._tracker, self._path = tracker, scratch / PROGRESS_FILE
        self._done, self._written = 0, 0.0

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
        named = {f"{job.label}/{name}": value for name, value in numbers.items()}
        self._tracker.log(named, step=epoch, axis="epoch")
        for name, values in evaluation.histograms().items():
            self._tracker.histogram(f"{job.label}/{name}", values.numpy())

    def top_modes(self, epoch: int, evaluations: Mapping[SaeJob, Evaluation]) -> None:
        """Log a table of the modes that correlate most with a class, of all SAEs that advance together."""
        rows: list[list[Any]] = []
        for job, evaluation in evaluations.items():
            where = [epoch, job.layer, job.quantity, job.architecture]
            rows += [where + mode for mode in evaluation.top_modes()]
        if rows:
            self._tracker.table("top_modes", list(TOP_MODE_COLUMNS), rows)


def read_progress(scratch: Path) -> int:
    """SAE epochs that rank 0 has counted so far."""
    try:
        return int(read_json(scratch / PROGRESS_FILE)["done"])
    except (OSError, ValueError, KeyError):
        return 0
