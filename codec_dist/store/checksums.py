"""Checksums of what is in files, fast enough to be computed on every write and every read."""

from collections.abc import Sequence

import google_crc32c
import numpy as np

METHOD = "crc32c"


def checksum(content: np.ndarray | bytes) -> str:
    """CRC-32C of an array's bytes in C order, little-endian, or of other bytes: 8 hex digits.

    CRC-32C runs at 16 to 24 GB/s where SHA-256 runs at 1.7 and CRC-32 at 2.5 (one core, 4 to 16 MB in memory).
    """
    if isinstance(content, np.ndarray):
        content = np.ascontiguousarray(content, dtype=content.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return f"{google_crc32c.value(content):08x}"


class RunningChecksum:
    """CRC-32C of bytes that come piece by piece."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, piece: np.ndarray) -> None:
        """Take in the next piece (uint8)."""
        self._value = google_crc32c.extend(self._value, piece)

    def result(self) -> str:
        """The checksum of all pieces: 8 hex digits."""
        return f"{self._value:08x}"


def join_checksums(parts: Sequence[str]) -> str:
    """The checksums of the chunks of a block as one text, e.g. ``crc32c:1a2b3c4d,5e6f7a8b``."""
    return f"{METHOD}:{','.join(parts)}"


def split_checksums(text: str | None) -> list[str]:
    """The inverse of :func:`join_checksums`; nothing where there is no text, or one of another method."""
    method, _, parts = (text or "").partition(":")
    return parts.split(",") if method == METHOD and parts else []
