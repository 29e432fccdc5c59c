"""The errors of this package."""

from codec_dist.utils import CodecError


class TrainingError(CodecError):
    """SAEs that cannot be trained as asked."""


class UnfitRowsError(TrainingError):
    """Rows of a layer and quantity that no SAE can be trained on; those of others can."""
