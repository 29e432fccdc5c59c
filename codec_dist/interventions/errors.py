"""The error of this package."""

from codec_dist.utils import CodecError


class InterventionError(CodecError):
    """An intervention that cannot be made, or a result that cannot be computed from the counts."""
