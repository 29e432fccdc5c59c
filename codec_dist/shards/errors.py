"""The kinds of error of this package."""

from codec_dist.utils import CodecError


class ShardError(CodecError):
    """Shards, their index or a source of images that cannot be used as asked."""


class DamagedTarError(ShardError):
    """A tar that is cut short or not a tar: which samples it should hold is not known."""
