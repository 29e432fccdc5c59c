"""What ranks that train apart have to log, on its way to rank 0, which alone speaks to the tracker."""

import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codec_dist.training.evaluation import Evaluation
from codec_dist.training.logbook import PROGRESS_FILE, Logbook, read_progress
from codec_dist.training.plan import SaeJob
from codec_dist.utils import read_json, write_bytes_atomically, write_json_atomically

SECONDS_BETWEEN_WRITES = 1.0


class Spool:
    """Takes what a :class:`Logbook` takes, and leaves it in files of the scratch folder."""

    def __init__(self, scratch: Path, rank: int) -> None:
        self._scratch, self._rank = scratch, rank
        self._entries, self._done, self._written = 0, 0, 0.0

    def advance(self, sae_epochs: int) -> None:
        """Count epochs of SAEs as done."""
        self._done += sae_epochs
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.show_progress()

    def show_progress(self) -> None:
        """Let the driver know of all epochs counted so far."""
        self._written = time.monotonic()
        write_json_atomically(self._scratch / f"{self._rank}-{PROGRESS_FILE}", {"done": self._done})

    def evaluation(self, job: SaeJob, epoch: int, numbers: Mapping[str, float], evaluation: Evaluation) -> None:
        """See :meth:`Logbook.evaluation`."""
        self._leave("evaluation", job, epoch, dict(numbers), evaluation)

    def top_modes(self, epoch: int, evaluations: Mapping[SaeJob, Evaluation]) -> None:
        """See :meth:`Logbook.top_modes`."""
        self._leave("top_modes", epoch, dict(evaluations))

    def _leave(self, *entry: Any) -> None:
        path = self._scratch / f"spool-{self._rank:06d}-{self._entries:09d}.pickle"
        write_bytes_atomically(path, pickle.dumps(entry))
        self._entries += 1


def replay(scratch: Path, logbook: Logbook) -> None:
    """Log what other ranks have left so far."""
    for path in sorted(scratch.glob("spool-*.pickle")):
        name, *arguments = pickle.loads(path.read_bytes())  # noqa: S301 -- written by a rank of this very training
        getattr(logbook, name)(*arguments)
        path.unlink()


def read_all_progress(scratch: Path) -> int:
    """SAE epochs that all ranks have counted so far."""
    done = read_progress(scratch)
    for path in scratch.glob(f"*-{PROGRESS_FILE}"):
        try:
            done += int(read_json(path)["done"])
        except (OSError, ValueError, KeyError):
            continue
    return done
