"""The errors of this package."""

from codec_dist.utils import CodecError


class StoreError(CodecError):
    """A contribution store that cannot be made, written or read as asked."""


class StoreFullError(StoreError):
    """There is no space left where the store is: no other shard can be written before there is."""


class LeaseError(StoreError):
    """Another process works on the store."""
