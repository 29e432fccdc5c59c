"""One number for all rows of a store, whatever their order."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

MODULUS = 1 << 256


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
