"""The errors of this room."""

from collections.abc import Sequence

from codec_dist.utils import CodecError


class AttributionError(CodecError):
    """Contributions cannot be computed as asked; the message names the layer, or the setting, and the cause."""


class NotFiniteError(AttributionError):
    """Some samples give a NaN or an infinity.

    Attributes:
        samples: their positions in the batch.
    """

    def __init__(self, message: str, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.samples = tuple(samples)
