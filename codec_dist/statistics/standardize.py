"""Rows of mean 0 and norm 1, whose dot products are Pearson correlations."""

import torch
from jaxtyping import Float
from torch import Tensor


def standardize(rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
    """Each row less its mean, divided by its norm; nan for a constant row (told exactly) or one that holds nan."""
    if not rows.numel():
        return torch.full_like(rows, torch.nan)
    low, high = rows.aminmax(dim=1, keepdim=True)
    rows = (rows - low) / (high - low)  # in [0, 1]: no square can overflow or vanish; 0/0 for constant rows
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True)
