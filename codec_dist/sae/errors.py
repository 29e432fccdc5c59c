"""The faults of this room that a user can mend."""

from codec_dist.utils import CodecError


class SaeError(CodecError):
    """An SAE that cannot be built, read or used as asked."""
