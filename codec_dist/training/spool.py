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
        self._scratch, self._rank = scratch, rank
        self._left = 0
        self.epochs = EpochCount(scratch, rank)

    def enter(self, notes: Sequence[Note]) -> None:
        """See :meth:`Logbook.enter`."""
        path = self._scratch / f"spool-{self._rank:06d}-{self._left:09d}.json"
        write_json_atomically(path, {"notes": [asdict(note) for note in notes]})
        self._left += 1


def replay(scratch: Path, logbook: Logbook) -> None:
    """Log what other ranks have left so far."""
    for path in sorted(scratch.glob("spool-*.json")):
        logbook.enter([Note(**note) for note in read_json(path)["notes"]])
        path.unlink()
