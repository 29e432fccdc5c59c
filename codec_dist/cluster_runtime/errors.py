"""The error of this package."""

from codec_dist.utils import CodecError


class ClusterError(CodecError):
    """A cluster that does not answer, has no room for what was asked, or lost it."""
