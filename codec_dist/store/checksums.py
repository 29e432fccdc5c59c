"""Checksums: of what is in files, fast enough for every write and every read, and of all rows of a store."""

import hashlib
import json
from collections.abc import Sequence

import google_crc32c
import numpy as np

METHOD = "crc32c"

MODULUS = 1 << 256


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


# ---- One number for all rows of a store, whatever their order


class RowSum:
    """Sum modulo 2²⁵⁶ of the hashes of rows. Rows may come in any order and grouping; sums may be merged."""

    def __init__(self) -> None:
        self._sum = 0

    def update(self, shard: str, keys: Sequence[str], layer: str, quantity: str, values: np.ndarray) -> None:
        """Add rows ``values`` [rows, channels] of the samples ``keys``.

        Hashed per row: the JSON list [shard, key, layer, quantity], a zero byte, and the little-endian bytes
        of the row in the stored type.
        """
        rows = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        for key, row in zip(keys, rows, strict=True):
            name = json.dumps([shard, key, layer, quantity], ensure_ascii=True)
            digest = hashlib.sha256(name.encode() + b"\0" + row.tobytes()).digest()
            self._sum += int.from_bytes(digest, "big")
        self._sum %= MODULUS

    def merge(self, other: "RowSum") -> None:
        """Add the rows that another sum has seen."""
        self._sum = (self._sum + other._sum) % MODULUS

    def result(self) -> str:
        """The sum as 64 hex digits."""
        return f"{self._sum:064x}"
