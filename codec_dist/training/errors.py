"""The faults of this room that a user can mend."""

from codec_dist.utils import CodecError


class TrainingError(CodecError):
    """SAEs that cannot be trained as asked."""
