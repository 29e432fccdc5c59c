"""E/I correlation: do the channels that push an output up also push it down?"""

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.statistics.accumulators import Distribution, DistributionAccumulator
from codec_dist.statistics.standardize import standardize


def sign_correlation(
    positive: Float[Tensor, "batch channels"], negative: Float[Tensor, "batch channels"]
) -> Float[Tensor, "batch"]:
    """E/I correlation of each sample, −Pearson(negative, positive) across channels (METHOD §4).

    Args:
        positive: [batch, channels] positive parts, ≥ 0.
        negative: [batch, channels] negative parts, signed, ≤ 0.

    Returns:
        [batch], float64 in [−1, 1]: 1 where excitation and inhibition are balanced in every channel;
        nan where one of the two is the same in all channels.
    """
    if not positive.shape[1]:
        return torch.full((len(positive),), torch.nan, dtype=torch.float64)
    product = standardize(positive.to(torch.float64)) * standardize(negative.to(torch.float64))
    return -product.sum(dim=1).clamp(-1, 1)


class SignCorrelation:
    """Mergeable distribution of the E/I correlation over samples."""

    def __init__(self) -> None:
        self._distribution = DistributionAccumulator(-1.0, 1.0)

    def update(self, positive: Float[Tensor, "batch channels"], negative: Float[Tensor, "batch channels"]) -> None:
        """Add samples by their positive and (signed) negative parts."""
        self._distribution.update(sign_correlation(positive, negative))

    def merge(self, other: "SignCorrelation") -> "SignCorrelation":
        """Add what ``other`` has seen; returns self."""
        self._distribution.merge(other._distribution)
        return self

    def result(self) -> Distribution:
        """Mean and quartiles over all samples so far."""
        return self._distribution.result()
