"""All statistics of one layer's contributions (or activations), in one pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.statistics.accumulators import (
    ClassMeans,
    ClassMeansResult,
    Distribution,
    HoyerStatistics,
    Moments,
    SignCorrelation,
)
from codec_dist.statistics.errors import StatisticsError


@dataclass(frozen=True)
class LayerStatisticsResult:
    """Statistics of one quantity at one layer (docs/method.md §4); net = positive + negative part."""

    samples: int
    hoyer: Distribution
    """Hoyer sparsity of the net vector of each sample."""
    sign_correlation: Distribution
    """E/I correlation of each sample."""
    class_means: ClassMeansResult
    """Class means of the net vectors, their dimensionality and correlations."""
    channel_minimum: Float[Tensor, "channels"]
    """Smallest net value of each channel; nan without samples."""
    channel_maximum: Float[Tensor, "channels"]
    """Largest net value of each channel; nan without samples."""

    @property
    def channel_range(self) -> Float[Tensor, "channels"]:
        """Largest minus smallest net value of each channel."""
        return self.channel_maximum - self.channel_minimum

    def numbers(self) -> dict[str, int | float | None]:
        """The statistics that are one number each, by column name; None where undefined."""
        return {
            "samples": self.samples,
            **_columns("hoyer", self.hoyer),
            "components_95": self.class_means.components_95,
            "participation_ratio": self.class_means.participation_ratio,
            **_columns("ei", self.sign_correlation),
        }


class LayerStatistics:
    """Mergeable statistics of vectors that come as positive and (signed) negative parts."""

    def __init__(self, channels: int, classes: int) -> None:
        self.channels = channels
        self._hoyer = HoyerStatistics()
        self._sign_correlation = SignCorrelation()
        self._class_means = ClassMeans(channels, classes)
        self._net = Moments(channels)

    def update(
        self,
        positive: Float[Tensor, "batch channels"],
        negative: Float[Tensor, "batch channels"],
        labels: Int[Tensor, "batch"],
    ) -> None:
        """Add samples; label −1 stands for none (such samples count for all but the class means).

        Raises:
            StatisticsError: another number of channels, a label that is no class, a value nan or infinite.
        """
        if positive.shape[1] != self.channels:
            raise StatisticsError(f"rows of {positive.shape[1]} channels given to statistics of {self.channels}")
        positive, negative = positive.to("cpu", torch.float64), negative.to("cpu", torch.float64)
        net = positive + negative
        self._net.update(net)
        self._hoyer.update(net)
        self._sign_correlation.update(positive, negative)
        self._class_means.update(net, labels)

    def merge(self, other: "LayerStatistics") -> "LayerStatistics":
        """Add what ``other`` has seen; returns self.

        Raises:
            StatisticsError: the other has other numbers of channels or classes.
        """
        self._class_means.merge(other._class_means)
        self._net.merge(other._net)
        self._hoyer.merge(other._hoyer)
        self._sign_correlation.merge(other._sign_correlation)
        return self

    def result(self) -> LayerStatisticsResult:
        """The statistics of all that was added so far."""
        empty = self._net.count == 0
        return LayerStatisticsResult(
            samples=self._net.count,
            hoyer=self._hoyer.result(),
            sign_correlation=self._sign_correlation.result(),
            class_means=self._class_means.result(),
            channel_minimum=self._net.minimum.masked_fill(torch.tensor(empty), torch.nan),
            channel_maximum=self._net.maximum.masked_fill(torch.tensor(empty), torch.nan),
        )


def _columns(prefix: str, distribution: Distribution) -> dict[str, int | float | None]:
    return {
        f"{prefix}_mean": distribution.mean,
        f"{prefix}_q1": distribution.first_quartile,
        f"{prefix}_median": distribution.median,
        f"{prefix}_q3": distribution.third_quartile,
    }
