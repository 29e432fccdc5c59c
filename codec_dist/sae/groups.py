"""What SAEs on several processes say to each other; alone, nothing."""

from typing import Any

from jaxtyping import Shaped
from torch import Tensor


class Group:
    """Processes that share a batch or a dictionary. This one stands for a process that has no others.

    :class:`codec_dist.sae.sharded.ProcessGroup` is the one for many. A trainer may give its own.
    """

    rank: int = 0
    size: int = 1

    def gather(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "ranks ..."]:
        """The tensors of all processes, of one shape, in the order of ranks. Not differentiable."""
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: Shaped[Tensor, "..."], rank: int) -> Shaped[Tensor, "..."]:
        """The tensor of process ``rank``, which overwrites the others' (contiguous ones). Not differentiable."""
        return tensor

    def sum(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The sum over processes; its gradient passes to each process as it is."""
        return tensor

    def copy(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """``tensor``, which all processes hold alike; its gradients are summed over processes."""
        return tensor

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Group":
        return self


ALONE = Group()
