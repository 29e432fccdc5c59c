"""The error of this room."""

from codec_dist.utils import CodecError


class ModelError(CodecError):
    """A model, its weights, its preprocessing or one of its layers is not as asked."""
