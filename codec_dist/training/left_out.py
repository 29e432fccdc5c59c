"""SAEs that could not be trained, which leave the others alone: on their way from the ranks, and in the run."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codec_dist.training.sae_jobs import SaeJob
from codec_dist.utils import read_json, write_json_atomically

LEFT_OUT_FILE = "left_out.json"
NAMED = 5


@dataclass(frozen=True)
class LeftOut:
    """An SAE that was asked for and could not be trained."""

    layer: str
    quantity: str
    architecture: str
    folder: str
    """Where it would be, relative to the run's ``sae`` folder."""
    reason: str
    """One sentence."""

    @classmethod
    def of(cls, job: SaeJob, reason: str) -> "LeftOut":
        """An SAE with the reason why it is left out."""
        return cls(job.layer, job.quantity, job.architecture, job.folder.as_posix(), reason)


def write_left_out(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write ``left_out.json``, also where nothing is left out."""
    write_json_atomically(folder / LEFT_OUT_FILE, [asdict(one) for one in left_out])


def read_left_out(folder: Path) -> list[LeftOut]:
    """What :func:`write_left_out` wrote; nothing where there is no such file or it cannot be read."""
    try:
        rows: Any = read_json(folder / LEFT_OUT_FILE)
        return [LeftOut(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def tell_left_out(left_out: Sequence[LeftOut]) -> None:
    """One line for each reason, of which one layer and quantity may have several SAEs."""
    reasons = list(dict.fromkeys(one.reason for one in left_out))
    for reason in reasons[:NAMED]:
        count = sum(one.reason == reason for one in left_out)
        sys.stderr.write(f"train: {count:,} SAE{'s' * (count != 1)} left out, the others are trained: {reason}\n")
    if len(reasons) > NAMED:
        more = sum(one.reason in reasons[NAMED:] for one in left_out)
        sys.stderr.write(f"train: {more:,} more SAEs left out, see sae/{LEFT_OUT_FILE}\n")
