"""The order of packed samples: by a hash of (seed, key), whatever the order of the source."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, UInt64


def rank_of(seed: int, key: str) -> bytes:
    """What samples are sorted by: 32 bytes, equal for equal keys only."""
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def ranks_of(seed: int, keys: Iterable[str]) -> UInt64[np.ndarray, "samples words=4"]:
    """The ranks of many keys as numbers, most significant word first."""
    return np.frombuffer(b"".join(rank_of(seed, key) for key in keys), dtype=">u8").reshape(-1, 4).astype(np.uint64)


def order_of(ranks: UInt64[np.ndarray, "samples words=4"]) -> Int[np.ndarray, " samples"]:
    """The numbers of the samples from the lowest rank to the highest."""
    return np.lexsort(ranks.T[::-1])


def repeated(
    ranks: UInt64[np.ndarray, "samples words=4"], order: Int[np.ndarray, " samples"]
) -> Int[np.ndarray, " repeated"]:
    """The numbers of samples whose key an earlier one has."""
    equal = (ranks[order[1:]] == ranks[order[:-1]]).all(axis=1)
    return order[1:][equal]
