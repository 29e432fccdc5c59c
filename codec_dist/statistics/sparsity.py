"""Hoyer sparsity: how few entries carry a vector."""

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.statistics.accumulators import Distribution, DistributionAccumulator


def hoyer(vectors: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch"]:
    """Hoyer sparsity of each vector, (√d − ‖v‖₁/‖v‖₂)/(√d − 1) (Hoyer 2004; METHOD §4).

    Args:
        vectors: [..., channels], any floating type, any sign and scale.

    Returns:
        [...], float64 in [0, 1]: 0 for equal magnitudes, 1 for a single nonzero entry; nan where it is
        undefined: an all-zero vector, a vector with one channel only, or one that holds nan or infinity.
    """
    channels = vectors.shape[-1]
    if channels < 2:
        return torch.full(vectors.shape[:-1], torch.nan, dtype=torch.float64, device=vectors.device)
    magnitudes = vectors.to(torch.float64).abs()
    # Dividing by the largest entry keeps squares from overflowing or vanishing, and turns zero vectors into nan.
    magnitudes = magnitudes / magnitudes.amax(dim=-1, keepdim=True)
    ratio = magnitudes.sum(dim=-1) / magnitudes.square().sum(dim=-1).sqrt()
    return ((channels**0.5 - ratio) / (channels**0.5 - 1)).clamp(0, 1)


class HoyerStatistics:
    """Mergeable distribution of the Hoyer sparsity of vectors; undefined ones are counted, not averaged."""

    def __init__(self) -> None:
        self._distribution = DistributionAccumulator(0.0, 1.0)

    def update(self, vectors: Float[Tensor, "batch channels"]) -> None:
        """Add vectors."""
        self._distribution.update(hoyer(vectors))

    def merge(self, other: "HoyerStatistics") -> "HoyerStatistics":
        """Add what ``other`` has seen; returns self."""
        self._distribution.merge(other._distribution)
        return self

    def result(self) -> Distribution:
        """Mean and quartiles over all vectors so far."""
        return self._distribution.result()
