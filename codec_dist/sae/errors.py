"""Errors of this package that a user can repair."""

from codec_dist.utils import CodecError


class SaeError(CodecError):
    """An SAE that cannot be built, read or used as asked."""
