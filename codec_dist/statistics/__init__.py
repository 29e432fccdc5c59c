"""Statistics of contributions and activations, per layer, as mergeable one-pass accumulators (METHOD §4)."""

from codec_dist.statistics.errors import StatisticsError
from codec_dist.statistics.moments import Moments
from codec_dist.statistics.sparsity import hoyer

__all__ = ["Moments", "StatisticsError", "hoyer"]
