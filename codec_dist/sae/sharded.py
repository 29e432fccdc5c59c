"""One SAE whose dictionary is spread over processes, each of which holds some of the modes (tensor parallel).

Every process computes the preactivations of its own modes, who survives is settled by comparing candidates of all
processes, and partial reconstructions are summed. All processes see the same rows and find the same loss; the
gradients of a process are those of the whole SAE for the parameters that it holds.
"""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from codec_dist.sae.arithmetic import Group
from codec_dist.sae.errors import SaeError
from codec_dist.sae.stacked import empty_like, place, tensors_of
from codec_dist.sae.trained import TrainedAutoencoder

MODE_BUFFERS = ("samples_since_fired",)


class ProcessGroup(Group):
    """Processes of ``torch.distributed`` that share a batch (``row_group``) or a dictionary (``mode_group``)."""

    def __init__(self, group: Any = None) -> None:
        """Wrap a process group that was started; default: the one of all processes."""
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "ranks ..."]:
        sent = tensor.detach().contiguous()
        sent = sent.byte() if sent.dtype == torch.bool else sent
        received = [torch.empty_like(sent) for _ in range(self.size)]
        self._dist.all_gather(received, sent, group=self._group)
        return torch.stack(received).to(tensor.dtype)

    def broadcast(self, tensor: Shaped[Tensor, "..."], rank: int) -> Shaped[Tensor, "..."]:
        sent = tensor.detach()
        if self.rank == rank:
            sent = sent.clone(memory_format=torch.contiguous_format)
        self._dist.broadcast(sent, group=self._group, group_src=rank)
        return sent

    def sum(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return _Sum.apply(tensor, self)

    def copy(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return _Copy.apply(tensor, self)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes as a new tensor, outside of autograd."""
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._dist.all_reduce(result, group=self._group)
        return result


def shard(sae: TrainedAutoencoder, group: Group) -> TrainedAutoencoder:
    """The part of this process in an SAE that all processes of ``group`` hold alike.

    The part is used as the whole is: ``encode`` gives the loadings of its own modes, ``decode`` takes them and
    returns whole rows, ``loss`` is that of the whole. ``modes`` stays the number of all modes.

    Raises:
        SaeError: an SAE that is fitted, or fewer modes than processes.
    """
    if not isinstance(sae, TrainedAutoencoder):
        raise SaeError(f"{sae.architecture} is fitted, not trained by gradient: its dictionary cannot be sharded")
    if sae.modes < group.size:
        raise SaeError(f"a dictionary of {sae.modes} modes cannot be spread over {group.size} processes")
    start, end = (_first_mode(sae.modes, rank, group.size) for rank in (group.rank, group.rank + 1))
    part = empty_like(sae)
    for name, tensor in tensors_of(sae).items():
        if name in (*sae.mode_parameters, *MODE_BUFFERS):
            tensor = tensor[start:end]
        elif name == "statistics":
            tensor = tensor.new_zeros(end - start + 1 + sae.extra_statistics)
        place(part, name, tensor.clone())
    part.scale, part.sign, part.row_group = sae.scale, sae.sign, sae.row_group
    part.mode_group, part.first_mode = group, start
    return part.train(sae.training)


def unshard(part: TrainedAutoencoder) -> TrainedAutoencoder:
    """The whole SAE in the memory of the host, on every process of the group: to save it, for instance."""
    whole = empty_like(part)
    for name, tensor in tensors_of(part).items():
        if name in (*part.mode_parameters, *MODE_BUFFERS):
            tensor = whole_on_host(part, tensor)
        elif name == "statistics":
            tensor = torch.zeros(part.modes + 1 + part.extra_statistics, dtype=tensor.dtype)
        place(whole, name, tensor.to("cpu", copy=True))
    whole.scale, whole.sign, whole.row_group = part.scale, part.sign, part.row_group
    return whole.train(part.training)


def whole_on_host(part: TrainedAutoencoder, own: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "modes ..."]:
    """Put together what every process holds for its modes, on the CPU; the device never holds more than two parts."""
    group, pieces = part.mode_group, []
    for rank in range(group.size):
        size = _first_mode(part.modes, rank + 1, group.size) - _first_mode(part.modes, rank, group.size)
        piece = own if rank == group.rank else own.new_empty(size, *own.shape[1:])
        pieces.append(group.broadcast(piece, rank).cpu())
    return torch.cat(pieces)


class Joined(nn.Module):
    """A divided SAE with the loadings of all modes, which every process sees; all of them call it alike."""

    def __init__(self, part: TrainedAutoencoder) -> None:
        super().__init__()
        self.part = part

    def encode(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        """Loadings of rows in stored units."""
        part, own = self.part, self.part.encode(rows).detach()
        bounds = [_first_mode(part.modes, rank, part.mode_group.size) for rank in range(part.mode_group.size + 1)]
        sizes = [end - start for start, end in pairwise(bounds)]
        padded = torch.cat([own, own.new_zeros(len(own), max(sizes) - own.shape[1])], dim=1)
        pieces = part.mode_group.gather(padded)
        return torch.cat([piece[:, :size] for piece, size in zip(pieces, sizes, strict=True)], dim=1)

    def decode(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        """Rows in stored units from loadings."""
        first = self.part.first_mode
        return self.part.decode(loadings[:, first : first + len(self.part.samples_since_fired)])


def _first_mode(modes: int, rank: int, size: int) -> int:
    return modes * rank // size


class _Sum(torch.autograd.Function):
    """Sum over processes; backward, every process has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        return group.total(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Copy(torch.autograd.Function):
    """Nothing; backward, the gradients that reach the copies are summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.total(gradients[0]), None
