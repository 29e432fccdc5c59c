"""Reading a store: whole chunks of valid rows, checked, in the order of the table of samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from codec_dist.store.chunks import ChunkFiles
from codec_dist.store.digest import RowSum
from codec_dist.store.errors import StoreError
from codec_dist.store.info import StoreInfo
from codec_dist.store.layout import read_layout
from codec_dist.store.ledger import Marker, read_markers
from codec_dist.store.quantities import terms_of
from codec_dist.store.samples import read_samples


@dataclass(frozen=True)
class Block:
    """The valid rows of one shard in one array."""

    shard_number: int
    start: int
    """Place of the first row in the table of samples."""
    values: Float[np.ndarray, "rows channels"]


class ContributionStore:
    """A store as it was when opened: the shards that were done then, in the order of their numbers.

    Every block that is read is compared with the checksum in its marker, so that a lost, torn or foreign
    chunk is an error and never a row of zeros.

    Raises:
        StoreError: ``path`` is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self._layout = read_layout(path)
        self._markers = read_markers(self._layout)
        self._chunks = ChunkFiles(self._layout)

    @property
    def location(self) -> str:
        """Folder or URL of the store."""
        return str(self._layout.place)

    @property
    def path(self) -> Path:
        """Folder of the store.

        Raises:
            StoreError: the store is at a URL.
        """
        return self._layout.path

    @property
    def identity(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return self._layout.identity

    @property
    def identity_hash(self) -> str:
        """Hash of the identity and of the store's form (64 hex digits)."""
        return self._layout.identity_hash

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen by measuring when the store was made."""
        return self._layout.settings

    @property
    def layers(self) -> dict[str, int]:
        """Layer key → channels."""
        return dict(self._layout.layers)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the stored quantities; ``-net`` is derived from both signs of one."""
        return tuple(self._layout.quantities)

    @property
    def targets(self) -> tuple[str, ...]:
        return self._layout.targets

    @property
    def shards(self) -> tuple[tuple[str, int], ...]:
        """Name and number of samples of every shard, done or not, by shard number."""
        return self._layout.shards

    @property
    def block_rows(self) -> int:
        """Rows of each shard's block."""
        return self._layout.block_rows

    @property
    def complete(self) -> bool:
        """Whether every shard was done when the store was opened."""
        return len(self._markers) == len(self._layout.shards)

    @property
    def shard_numbers(self) -> list[int]:
        """Numbers of the finished shards, in order."""
        return list(self._markers)

    @property
    def markers(self) -> dict[int, Marker]:
        """Markers of the finished shards by shard number."""
        return dict(self._markers)

    @cached_property
    def samples(self) -> pa.Table:
        """Table (shard, key, label, prediction, target_value, baseline_value, row, …) of the finished shards.

        ``row`` is the row in the Zarr arrays; the place in this table is what :meth:`read` takes.
        """
        return read_samples(self._layout, self._markers)

    def __len__(self) -> int:
        return sum(marker.rows for marker in self._markers.values())

    def blocks(self, layer: str, quantity: str, shards: Sequence[int] | None = None) -> Iterator[Block]:
        """The blocks of one array, of all finished shards or of those named, in the order asked.

        Raises:
            StoreError: unknown layer or quantity (the nearest names are given), a shard that is not
                done, or a block that does not match its checksum.
        """
        self._layout.channels(layer)
        terms = terms_of(quantity, self._layout.quantities)
        numbers = self.shard_numbers if shards is None else [int(number) for number in shards]
        for number in numbers:
            self._layout.check_shard(number)
            if number not in self._markers:
                name = self._layout.shards[number][0]
                raise StoreError(
                    f"shard {number} ({name}) of the store {self.location} is not done: run `codec-dist extract`"
                )
        return (Block(number, self._starts[number], self._read_block(layer, terms, number)) for number in numbers)

    def read(
        self, layer: str, quantity: str, indices: Int[np.ndarray, "rows"] | None = None
    ) -> Float[np.ndarray, "rows channels"]:
        """Rows of one array in the order of the table of samples, or of ``indices`` into it.

        Whole blocks are read, so many indices of one shard cost one read.

        Raises:
            StoreError: as :meth:`blocks`, or an index outside the table.
        """
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise StoreError(
                f"indices from {chosen.min()} to {chosen.max()} were asked: the store has {len(self)} rows"
            )
        result = np.empty((len(chosen), self._layout.channels(layer)), self._layout.dtype)
        numbers = np.array(self.shard_numbers, dtype=np.int64)
        ends = np.cumsum([self._markers[number].rows for number in self.shard_numbers])
        block_of = np.searchsorted(ends, chosen, side="right")
        needed = [self.shard_numbers[place] for place in np.unique(block_of)]
        for block in self.blocks(layer, quantity, shards=needed):
            places = np.flatnonzero(numbers[block_of] == block.shard_number)
            result[places] = block.values[chosen[places] - block.start]
        return result

    def digest(self) -> str:
        """A number (64 hex digits) of all rows of the finished shards, independent of their order and chunking.

        Sum modulo 2²⁵⁶ of SHA-256 over (shard, key, layer, quantity, bytes of the row), one streaming pass.
        """
        total = RowSum()
        keys = self.samples["key"].to_pylist()
        for layer in self._layout.layers:
            for name, quantity in self._layout.quantities.items():
                for block in self.blocks(layer, name):
                    shard = self._layout.shards[block.shard_number][0]
                    block_keys = keys[block.start : block.start + len(block.values)]
                    total.update(shard, block_keys, layer, quantity.full_name, block.values)
        return total.result()

    def info(self) -> StoreInfo:
        """What the store holds; its ``str`` is a table for people."""
        return StoreInfo.of(self._layout, self._markers)

    @cached_property
    def _starts(self) -> dict[int, int]:
        starts, start = {}, 0
        for number, marker in self._markers.items():
            starts[number] = start
            start += marker.rows
        return starts

    def _read_block(self, layer: str, terms: tuple[str, ...], number: int) -> np.ndarray:
        first, *others = (self._chunks.read_block(self._markers[number], layer, term) for term in terms)
        for other in others:
            first += other
        return first
