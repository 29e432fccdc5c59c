"""Which preactivations survive: the k largest of a row, or the k · rows largest of a batch."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from codec_dist.sae.groups import ALONE, Group


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
    chosen = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))
    first = modes.rank * k
    return chosen[..., first : first + values.shape[-1]]
