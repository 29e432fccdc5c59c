"""The error of this package."""

from codec_dist.utils import CodecError


class VisualizationError(CodecError):
    """A picture that cannot be computed or drawn."""
