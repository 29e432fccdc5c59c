"""The error of this package."""

from codec_dist.utils import CodecError


class TrackingError(CodecError):
    """Metrics that cannot be logged as asked: no credentials, no write access, or a value of the wrong kind."""
