"""What ranks that train apart have to log, on its way to rank 0, which alone speaks to the tracker."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from codec_dist.training.logbook import Logbook
from codec_dist.training.notes import Note
from codec_dist.training.progress import EpochCount
from codec_dist.utils import read_json, write_json_atomically


class Spool:
    """Takes what a :class:`Logbook` takes, and leaves it in files of the scratch folder."""

    def __init__(self, scratch: Path, rank: int) -> None:
        self._scratch, self._name = scratch, f"spool-{rank:06d}"
        # What was left by a rank of this number that died may not have been heard yet.
        unheard = [int(path.stem.rpartition("-")[2]) for path in scratch.glob(f"{self._name}-*.json")]
        self._next = 1 + max(unheard, default=-1)
        self.epochs = EpochCount(scratch, rank)

    def enter(self, notes: Sequence[Note]) -> None:
        """See :meth:`Logbook.enter`."""
        path = self._scratch / f"{self._name}-{self._next:09d}.json"
        write_json_atomically(path, {"notes": [asdict(note) for note in notes]})
        self._next += 1


def replay(scratch: Path, logbook: Logbook) -> None:
    """Log what other ranks have left so far."""
    for path in sorted(scratch.glob("spool-*.json")):
        logbook.enter([Note(**note) for note in read_json(path)["notes"]])
        path.unlink()
