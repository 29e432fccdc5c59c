"""The one kind of error of this room."""

from codec_dist.utils import CodecError


class ShardError(CodecError):
    """Shards, their index or a source of images that cannot be used as asked."""
