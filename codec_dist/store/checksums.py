"""Checksums of block bytes, fast enough to be computed on every write and every read."""

import google_crc32c
import numpy as np


def checksum(values: np.ndarray) -> str:
    """CRC-32C of an array's bytes in C order, little-endian, e.g. ``crc32c:1a2b3c4d``.

    CRC-32C runs at 10 GB/s where SHA-256 runs at 1.7 and CRC-32 at 2.5 (one core, 16 MB in memory).
    """
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return f"crc32c:{google_crc32c.value(values.view(np.uint8)):08x}"
