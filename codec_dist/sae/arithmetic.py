"""Arithmetic that is the same for one SAE and for a stack of them, whose tensors have a leading dimension."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


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
