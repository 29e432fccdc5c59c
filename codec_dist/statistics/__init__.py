"""Statistics of contributions and activations, per layer, as mergeable one-pass accumulators (METHOD §4).

Every accumulator has ``update(batch)``, ``merge(other)`` (in place, returns self) and ``result()``, and keeps
float64 state on the CPU, so that any number of workers can each see a part of the data.
"""

from codec_dist.statistics.accumulators import Distribution, DistributionAccumulator
from codec_dist.statistics.class_means import ClassMeans, ClassMeansResult
from codec_dist.statistics.errors import StatisticsError
from codec_dist.statistics.layer_statistics import LayerStatistics, LayerStatisticsResult
from codec_dist.statistics.moments import Moments
from codec_dist.statistics.sign_correlation import SignCorrelation, sign_correlation
from codec_dist.statistics.sparsity import HoyerStatistics, hoyer

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
