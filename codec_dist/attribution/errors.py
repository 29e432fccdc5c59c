"""The errors of this room."""

import errno
from collections.abc import Sequence

import torch

from codec_dist.utils import CodecError

ALLOCATION_FAILURES = ("can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED", "out of memory")


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory, or an error's cause is that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # The CPU's allocator and the libraries of a GPU have no class of their own.
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILURES)
    return told or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
