"""The error of this package."""

from codec_dist.utils import CodecError


class ReportError(CodecError):
    """A report that cannot be built: no run there, or a file of the run that cannot be read."""
