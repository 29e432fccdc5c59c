"""Arithmetic that is the same for one SAE and for a stack of them, in one process and in several."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_SHARE = 1e-3


def wide(value: int | float | Shaped[Tensor, "..."]) -> int | float | Shaped[Tensor, "..."]:
    """A number of each member, shaped to go with [members, rows, columns]; a plain number as it is."""
    return value[..., None, None] if isinstance(value, Tensor) else value


def affine(
    offset: Float[Tensor, "*members outputs"],
    rows: Float[Tensor, "*members batch inputs"],
    weights: Float[Tensor, "*members outputs inputs"],
) -> Float[Tensor, "*members batch outputs"]:
    """``offset`` + ``rows`` · ``weights``ᵀ in one call."""
    if rows.ndim == 2:
        return torch.addmm(offset, rows, weights.T)
    return torch.baddbmm(offset.unsqueeze(-2), rows, weights.mT)


def mean_square(errors: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members"]:
    """The mean square per member; 0 (not NaN) for no rows, so that a process without rows can take part."""
    return errors.square().sum((-2, -1)) / max(errors.shape[-2] * errors.shape[-1], 1)


def row_mean(values: Float[Tensor, "*members batch"]) -> Float[Tensor, "*members"]:
    """The mean over rows; 0 for no rows."""
    return values.sum(-1) / max(values.shape[-1], 1)


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


# ---- Which preactivations survive: the k largest of a row, or the k · rows largest of a batch


def strongest(
    preactivations: Float[Tensor, "*members batch modes"],
    k: int,
    k_of_member: Int[Tensor, "members"] | None = None,
    modes: Group = ALONE,
) -> tuple[Float[Tensor, "*members batch chosen"], Int[Tensor, "*members batch chosen"]]:
    """The k largest values of each row and the modes they belong to; −∞ stands for "none".

    Args:
        preactivations: of the modes that this process holds.
        k: how many.
        k_of_member: fewer than ``k`` for some members of a stack.
        modes: processes over which modes are spread; the k largest of all of them are found, and each process
            gets those that it holds.
    """
    count = min(k, preactivations.shape[-1])
    values, indices = preactivations.topk(count, dim=-1, sorted=k_of_member is not None)
    if modes.size > 1:
        keep = _among_all(values.detach(), k, k_of_member, modes)
    elif k_of_member is not None:
        keep = torch.arange(count, device=values.device) < k_of_member[:, None, None]
    else:
        return values, indices
    return values.masked_fill(~keep, -torch.inf), indices


def batch_threshold(
    preactivations: Float[Tensor, "*members batch modes"],
    count: int,
    count_of_member: Int[Tensor, "members"] | None = None,
    rows: Group = ALONE,
    modes: Group = ALONE,
) -> tuple[Float[Tensor, "*members"], Float[Tensor, "*members"]]:
    """The ``count``-th largest positive preactivation of a whole batch, and the smallest that is not below it.

    The first is 0 where fewer are positive, the second ∞ where none is. The batch is that of all processes
    in ``rows``, its modes those of all processes in ``modes``. Not differentiable.
    """
    values = preactivations.detach().relu().flatten(-2)
    for group in (modes, rows):
        values = _largest(values, count)
        if group.size > 1:
            values = group.gather(values).movedim(0, -2).flatten(-2)
    values = _largest(values, count)
    threshold = values[..., -1]
    if count_of_member is not None:
        threshold = values.gather(-1, count_of_member[:, None] - 1)[..., 0]
        values = values.masked_fill(values < threshold[:, None], 0)
    return threshold, values.masked_fill(values <= 0, torch.inf).amin(-1)


def _largest(values: Float[Tensor, "*members values"], count: int) -> Float[Tensor, "*members count"]:
    """The ``count`` largest in falling order, 0 where there are fewer."""
    found = values.topk(min(count, values.shape[-1]), dim=-1).values
    return pad(found, (0, count - found.shape[-1]))


def _among_all(
    values: Float[Tensor, "*members batch candidates"], k: int, k_of_member: Int[Tensor, "members"] | None, modes: Group
) -> Bool[Tensor, "*members batch candidates"]:
    """Which of this process's candidates are among the k largest of all processes."""
    padded = pad(values, (0, k - values.shape[-1]), value=-torch.inf)
    candidates = modes.gather(padded).movedim(0, -2).flatten(-2)
    order = candidates.topk(k, dim=-1).indices
    ranks = torch.arange(k, device=values.device)
    taken = ranks < k if k_of_member is None else ranks < k_of_member[:, None, None]
    selected = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
    first = modes.rank * k
    return selected[..., first : first + values.shape[-1]]


# ---- Numbers that the channels of rows are divided by


def channel_scales(
    rows: Float[Tensor, "rows channels"],
    deviations: Float[Tensor, "channels"],
    scale: float,
    *,
    per_channel: bool,
    flip: bool,
) -> Float[Tensor, "channels"]:
    """One divisor per channel.

    Args:
        rows: some rows, for their signs.
        deviations: standard deviation of each channel; used where ``per_channel``, but never less than a
            thousandth of ``scale``, so that channels which hardly vary are not blown up to noise.
        scale: standard deviation over everything.
        per_channel: divide by deviations; else by 1.
        flip: give channels whose values are all ≤ 0 a negative divisor, so that they become ≥ 0.
    """
    divisors = deviations.clamp(min=SMALLEST_SHARE * scale) if per_channel else torch.ones_like(deviations)
    if flip:
        highest, lowest = rows.amax(0).to(divisors), rows.amin(0).to(divisors)
        divisors = torch.where((highest <= 0) & (lowest < 0), -divisors, divisors)
    return divisors
