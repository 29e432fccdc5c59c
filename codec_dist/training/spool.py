"""What ranks have to log, on its way to the driver, which alone speaks to the tracker."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from codec_dist.training.notes import Note
from codec_dist.training.progress import EpochCount
from codec_dist.utils import read_json, write_bytes_atomically

PATTERN = "spool-*.json"


class Spool:
    """Leaves notes of evaluations in files of the scratch folder, each of which is there before what follows from it.

    Args:
        scratch: the folder.
        rank: who writes.
        done: epochs of all SAEs that were done before.
    """

    def __init__(self, scratch: Path, rank: int, done: int = 0) -> None:
        self._scratch, self._name = scratch, f"spool-{rank:06d}"
        # What was left by a rank of this number that died may not have been heard yet.
        unheard = [int(path.stem.rpartition("-")[2]) for path in scratch.glob(f"{self._name}-*.json")]
        self._next = 1 + max(unheard, default=-1)
        self.epochs = EpochCount(scratch, rank, done)

    def enter(self, notes: Sequence[Note]) -> None:
        """Leave the evaluations of SAEs that advance together."""
        if not notes:
            return
        self.epochs.show()
        path = self._scratch / f"{self._name}-{self._next:09d}.json"
        write_bytes_atomically(path, json.dumps({"notes": [vars(note) for note in notes]}).encode())
        self._next += 1


def unheard_notes(scratch: Path) -> Iterator[list[Note]]:
    """What the ranks have left so far; what was taken is removed with the next step of the iterator."""
    for path in sorted(scratch.glob(PATTERN)):
        try:
            notes = [Note(**note) for note in read_json(path)["notes"]]
        except (ValueError, KeyError, TypeError):
            # Of a training that was killed, by another version of this program.
            sys.stderr.write(f"train: {path} cannot be read: the evaluations in it are not logged\n")
            notes = []
        yield notes
        path.unlink()
