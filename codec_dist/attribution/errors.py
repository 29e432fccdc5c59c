"""The errors of this package."""

from collections.abc import Sequence

from codec_dist.utils import CodecError


class AttributionError(CodecError):
    """Contributions cannot be computed as asked; the message names the layer, or the setting, and the cause."""


def require_whole(setting: str, value: object, least: int, or_else: str = "") -> None:
    """Refuse a setting that is not a whole number from ``least`` up; configs may hold anything.

    Raises:
        AttributionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        other = f", or {or_else}" if or_else else ""
        raise AttributionError(f"{setting} is {value!r}: it must be a whole number from {least} up{other}")


class NotFiniteError(AttributionError):
    """Some samples give a NaN or an infinity.

    Attributes:
        samples: their positions in the batch.
    """

    def __init__(self, message: str, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.samples = tuple(samples)
