"""How many epochs of all SAEs are done, in files of the scratch folder that the driver reads."""

import time
from pathlib import Path

from codec_dist.utils import read_json, write_json_atomically

SUFFIX = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0


class EpochCount:
    """The epochs that one rank has counted, in a file of its own."""

    def __init__(self, scratch: Path, rank: int, done: int = 0) -> None:
        """Begin with ``done`` epochs, in place of what a rank of this number had counted before it died."""
        self._path = scratch / f"{rank}-{SUFFIX}"
        self.done = done
        """Epochs of SAEs counted so far."""
        self.show()

    def advance(self, sae_epochs: int) -> None:
        """Count epochs of SAEs as done; the file follows about once a second."""
        self.done += sae_epochs
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.show()

    def show(self) -> None:
        """Let the driver know of all epochs counted so far."""
        self._written = time.monotonic()
        write_json_atomically(self._path, {"done": self.done})


def ranks_count(scratch: Path) -> bool:
    """Whether any rank has begun to count."""
    return any(scratch.glob(f"*-{SUFFIX}"))


def read_progress(scratch: Path) -> int:
    """SAE epochs that all ranks have counted so far."""
    done = 0
    for path in scratch.glob(f"*-{SUFFIX}"):
        try:
            done += int(read_json(path)["done"])
        except (OSError, ValueError, KeyError):
            continue
    return done
