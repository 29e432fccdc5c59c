"""The error of this package."""

from codec_dist.utils import CodecError


class ExtractionError(CodecError):
    """An extraction that cannot start, or that ended without everything asked for."""
