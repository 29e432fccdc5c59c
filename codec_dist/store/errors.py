"""The one kind of error of this room."""

from codec_dist.utils import CodecError


class StoreError(CodecError):
    """A contribution store that cannot be made, written or read as asked."""
