"""Errors in what is given to an accumulator."""

from codec_dist.utils import CodecError


class StatisticsError(CodecError):
    """Values that cannot be accumulated, or accumulators that do not fit together."""
