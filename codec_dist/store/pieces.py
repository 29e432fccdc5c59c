"""The pieces in which a store is read."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Block:
    """The valid rows of one shard in one array."""

    shard_number: int
    start: int
    """Place of the first row in the table of samples."""
    values: Float[np.ndarray, "rows channels"]


class ChunkName(NamedTuple):
    """One chunk of one array."""

    shard_number: int
    part: int
    """Which of the chunks of the shard's block."""
    layer: str
    quantity: str


@dataclass(frozen=True)
class Chunk:
    """The valid rows of one chunk."""

    name: ChunkName
    start: int
    """Place of the first row in the table of samples."""
    values: Float[np.ndarray, "rows channels"]
