"""Statistics of contributions and activations, per layer, as mergeable one-pass accumulators (docs/method.md §4).

Every accumulator has ``update(batch)``, ``merge(other)`` (in place, returns self) and ``result()``, and keeps
float64 state on the CPU, so that any number of workers can each see a part of the data.
"""

from codec_dist.statistics.accumulators import (
    ClassMeans,
    ClassMeansResult,
    Distribution,
    DistributionAccumulator,
    HoyerStatistics,
    Moments,
    SignCorrelation,
    hoyer,
    sign_correlation,
)
from codec_dist.statistics.errors import StatisticsError
from codec_dist.statistics.layer_statistics import LayerStatistics, LayerStatisticsResult

__all__ = [
    "ClassMeans",
    "ClassMeansResult",
    "Distribution",
    "DistributionAccumulator",
    "HoyerStatistics",
    "LayerStatistics",
    "LayerStatisticsResult",
    "Moments",
    "SignCorrelation",
    "StatisticsError",
    "hoyer",
    "sign_correlation",
]
