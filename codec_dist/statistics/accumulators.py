"""Mean and quartiles of a bounded quantity in one pass, by a histogram of fixed bins."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.statistics.errors import StatisticsError
from codec_dist.statistics.moments import Moments

BINS = 1000


@dataclass(frozen=True)
class Distribution:
    """A quantity over samples. Numbers are None where no sample has a defined value."""

    samples: int
    """Samples with a defined value."""
    undefined: int
    """Samples for which the quantity is undefined."""
    mean: float | None
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    low: float
    """Lower edge of the first bin."""
    high: float
    """Upper edge of the last bin."""
    histogram: Int[Tensor, "bins"]
    """Samples in each of the equally wide bins from low to high."""


class DistributionAccumulator:
    """Mergeable distribution of a quantity that lies in [low, high].

    Mean, minimum and maximum are exact. A quantile is within one bin, (high − low)/bins, of what
    ``numpy.quantile`` gives on all values (a thousandth of the range by default).
    """

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.undefined = 0
        self._moments = Moments(1)
        self._counts = torch.zeros(bins, dtype=torch.int64)

    @property
    def samples(self) -> int:
        """Values seen, without the undefined ones."""
        return self._moments.count

    def update(self, values: Float[Tensor, "batch"]) -> None:
        """Add values; nan stands for undefined.

        Raises:
            StatisticsError: a value outside [low, high].
        """
        values = values.to("cpu", torch.float64)
        defined = values[~values.isnan()]
        outside = defined[(defined < self.low) | (defined > self.high)]
        if len(outside):
            raise StatisticsError(f"value {float(outside[0]):g} is outside the range {self.low:g} to {self.high:g}")
        position = (defined - self.low) * (self.bins / (self.high - self.low))
        self._counts += torch.bincount(position.long().clamp(max=self.bins - 1), minlength=self.bins)
        self._moments.update(defined[:, None])
        self.undefined += len(values) - len(defined)

    def merge(self, other: "DistributionAccumulator") -> "DistributionAccumulator":
        """Add what ``other`` has seen; returns self.

        Raises:
            StatisticsError: the other has other bins.
        """
        if (other.low, other.high, other.bins) != (self.low, self.high, self.bins):
            raise StatisticsError(
                f"a histogram of {other.bins} bins from {other.low:g} to {other.high:g} merged into one of "
                f"{self.bins} bins from {self.low:g} to {self.high:g}"
            )
        self._moments.merge(other._moments)
        self._counts = self._counts + other._counts
        self.undefined += other.undefined
        return self

    def quantile(self, fraction: float) -> float | None:
        """The value below which ``fraction`` of the samples lie, to one bin; None without samples."""
        if not self.samples:
            return None
        rank = fraction * (self.samples - 1)
        before = int(rank)
        after = min(before + 1, self.samples - 1)
        low, high = self._order_statistic(before), self._order_statistic(after)
        return low + (rank - before) * (high - low)

    def result(self) -> Distribution:
        """The distribution of all that was added so far."""
        return Distribution(
            samples=self.samples,
            undefined=self.undefined,
            mean=float(self._moments.mean[0]) if self.samples else None,
            first_quartile=self.quantile(0.25),
            median=self.quantile(0.5),
            third_quartile=self.quantile(0.75),
            low=self.low,
            high=self.high,
            histogram=self._counts.clone(),
        )

    def _order_statistic(self, rank: int) -> float:
        """The value of this rank (from 0), as if the values in a bin were spread evenly over it."""
        cumulative = self._counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, rank, right=True))
        inside = int(self._counts[index])
        place = (rank - (int(cumulative[index]) - inside) + 0.5) / inside
        value = self.low + (index + place) * (self.high - self.low) / self.bins
        return min(max(value, float(self._moments.minimum[0])), float(self._moments.maximum[0]))
