"""The processes that train together, and the few things they say to each other."""

import os
from copy import copy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(days=7)


class Ranks:
    """One rank's view of all ranks; alone when no process group was started.

    Tensors travel over the process group that the trainer started (NCCL or gloo), Python objects over
    gloo, so that neither needs the other's device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self.on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if together else 1
        # Ranks that train apart, or wait for a baseline to be fitted, may wait for long.
        self._objects: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if self.size > 1 else None

    def alone(self) -> "Ranks":
        """The rank by itself: no other takes part in what it computes so."""
        single = copy(self)
        single.rank, single.size = 0, 1
        return single

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._objects)
        return values[0]

    def share(self, count: int) -> slice:
        """The part of this rank in ``count`` things in order; the parts differ by at most one in length."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)
