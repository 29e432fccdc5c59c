"""What each of some ranks does in test_ranks.py, one training after the other: run as a script."""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from codec_dist.training.collectives import Ranks
from codec_dist.training.optimizer import Lockstep
from codec_dist.training.rank import train_on_rank


class Interrupted(Exception):  # noqa: N818 -- not a problem
    """Stands for a kill."""


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """End whatever trains inside when it begins its step of this number (counted over all groups)."""
    original, taken = Lockstep.step, 0

    def counted(self: Lockstep, *arguments: Any) -> None:
        nonlocal taken
        taken += 1
        if taken > step:
            raise Interrupted
        original(self, *arguments)

    with patch.object(Lockstep, "step", counted):
        try:
            yield
        except Interrupted:
            return
    raise AssertionError(f"the training was over after {taken} steps, before it could be interrupted")


def main() -> None:
    """Train the pickled (task, step to interrupt it at and go on, or None) of argument 1."""
    tasks, meeting_point, rank, size = sys.argv[1:]
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=int(rank), world_size=int(size))
    for task, step in pickle.loads(Path(tasks).read_bytes()):  # noqa: S301 -- of the test that starts this
        task.scratch.mkdir(parents=True, exist_ok=True)
        if step is not None:
            with interrupted_at(step):
                train_on_rank(task, Ranks())
            dist.barrier()
        train_on_rank(task, Ranks())


if __name__ == "__main__":
    main()
