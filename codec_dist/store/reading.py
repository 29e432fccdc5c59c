"""Reading a store: whole chunks of valid rows, checked, in the order of the table of samples or shuffled."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from codec_dist.store.checksums import RowSum
from codec_dist.store.chunks import ChunkFiles
from codec_dist.store.errors import StoreError
from codec_dist.store.info import StoreInfo
from codec_dist.store.layout import read_layout
from codec_dist.store.ledger import Marker, read_markers
from codec_dist.store.quantities import Quantity, terms_of
from codec_dist.store.row_selection import find_rows, spread_rows
from codec_dist.store.sample_tables import read_samples, shard_tables
from codec_dist.utils import derive_seed

Item = TypeVar("Item")
Result = TypeVar("Result")


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


class ContributionStore:
    """A store as it was when opened: the shards that were done then, in the order of their numbers.

    Every block that is read is compared with the checksum in its marker, so that a lost, torn or exchanged
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
        """Names of the stored quantities; ``-net`` and ``-both`` are derived from both signs of one."""
        return tuple(self._layout.quantities)

    def width(self, layer: str, quantity: str) -> int:
        """Numbers in a row: the layer's channels, or twice as many where both signs lie side by side.

        Raises:
            StoreError: as :meth:`blocks`.
        """
        terms = self._terms(layer, quantity)
        return self._layout.channels(layer) * (len(terms) if _side_by_side(quantity) else 1)

    @property
    def stored(self) -> dict[str, Quantity]:
        """Name of each stored quantity → its kind, target and sign."""
        return dict(self._layout.quantities)

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

    def sample_tables(self) -> Iterator[pa.Table]:
        """The tables of samples of the finished shards, one after the other, in order.

        Raises:
            StoreError: a table is lost or damaged.
        """
        return shard_tables(self._layout, self._markers)

    def __len__(self) -> int:
        return sum(marker.rows for marker in self._markers.values())

    def blocks(self, layer: str, quantity: str, shards: Sequence[int] | None = None) -> Iterator[Block]:
        """The blocks of one array, of all finished shards or of those named, in the order asked.

        Raises:
            StoreError: unknown layer or quantity (the nearest names are given), a shard that is not
                done, or a block that does not match its checksum.
        """
        self._terms(layer, quantity)
        numbers = self._checked(shards)
        return (Block(number, self._starts[number], self._read_block(layer, quantity, number)) for number in numbers)

    def chunk_names(
        self,
        layers: Sequence[str] | None = None,
        quantities: Sequence[str] | None = None,
        shards: Sequence[int] | None = None,
        *,
        seed: int | None = None,
    ) -> list[ChunkName]:
        """Names of the chunks with valid rows of some arrays; by default of all of the store.

        In the order of shards as given, of rows, of layers and of quantities as given. With a seed the rows'
        chunks are in a random order that depends on the seed and on their number alone; chunks of the same
        rows in different arrays stay neighbours.

        Raises:
            StoreError: as :meth:`blocks`.
        """
        arrays = [
            (layer, quantity)
            for layer in (self.layers if layers is None else layers)
            for quantity in (self.quantities if quantities is None else quantities)
        ]
        for array in arrays:
            self._terms(*array)
        rows = [
            (number, part)
            for number in self._checked(shards)
            for part in range(self._layout.parts(self._markers[number].rows))
        ]
        if seed is not None:
            order = np.random.default_rng(derive_seed(seed, "chunks")).permutation(len(rows))
            rows = [rows[place] for place in order]
        return [ChunkName(*place, *array) for place in rows for array in arrays]

    def rows_of(self, name: ChunkName) -> tuple[int, int]:
        """First and last (exclusive) place of a chunk's rows in the table of samples."""
        start, first = self._starts[name.shard_number], name.part * self._layout.chunk_rows
        rows = min(self._layout.chunk_rows, self._markers[name.shard_number].rows - first)
        return start + first, start + first + rows

    def chunks(self, names: Iterable[ChunkName], *, in_memory: int = 4, threads: int = 2) -> Iterator[Chunk]:
        """The chunks of these names, in their order, read ahead in threads.

        Args:
            names: e.g. from :meth:`chunk_names`.
            in_memory: chunks that are held at once: the one given last, those that wait, and those being read.
                A chunk of a ``-net`` or ``-both`` quantity counts twice. At least the given one and the next are held.
            threads: chunks that are read at once.

        Raises:
            StoreError: as :meth:`blocks`.
        """
        names = list(names)
        for name in dict.fromkeys((name.layer, name.quantity) for name in names):
            self._terms(*name)
        for number, part in {(name.shard_number, name.part) for name in names}:
            self._checked([number])
            if not 0 <= part < self._layout.parts(self._markers[number].rows):
                raise StoreError(f"there is no chunk {part} with valid rows in shard {number} of {self.location}")
        return read_ahead(
            names,
            self._read_chunk,
            budget=in_memory,
            threads=threads,
            weight=lambda name: len(self._terms(name.layer, name.quantity)),
        )

    def read(
        self, layer: str, quantity: str, indices: Int[np.ndarray, "rows"] | None = None
    ) -> Float[np.ndarray, "rows channels"]:
        """Rows of one array in the order of the table of samples, or of ``indices`` into it.

        Whole chunks are read, so many indices of one chunk cost one read.

        Raises:
            StoreError: as :meth:`blocks`, or an index outside the table.
        """
        selected = np.arange(len(self)) if indices is None else np.asarray(indices)
        if len(selected) and (selected.min() < 0 or selected.max() >= len(self)):
            raise StoreError(
                f"indices from {selected.min()} to {selected.max()} were requested: the store has {len(self)} rows"
            )
        names = self.chunk_names([layer], [quantity])
        bounds = [*(self.rows_of(name)[0] for name in names), len(self)]
        spread = spread_rows(selected, bounds)
        result = np.empty((len(selected), self.width(layer, quantity)), self._layout.dtype)
        chunks = self.chunks(names[number] for number, _, _ in spread)
        for chunk, (_, places, rows) in zip(chunks, spread, strict=True):
            result[places] = chunk.values[rows]
        return result

    def find(
        self,
        *,
        label: int | Sequence[int | None] | None = None,
        key: str | Sequence[str] | None = None,
        shard: str | Sequence[str] | None = None,
        part: str | Sequence[str] | None = None,
        split: pa.Table | str | Path | None = None,
        where: pc.Expression | None = None,
    ) -> Int[np.ndarray, "rows"]:
        """Indices, as :meth:`read` takes them and ascending, of the samples that satisfy all that is given.

        Args:
            label: a class, or several (None among them: samples without one).
            key: a sample's key, or several.
            shard: a shard's file name, or several.
            part: ``fit``, ``select`` or ``evaluate``, or several; needs ``split``.
            split: table (or its Parquet file) of shard, key and part, as ``split.parquet`` of a run.
            where: predicate on the columns of the table of samples, such as
                ``pc.field("prediction") != pc.field("label")``, and on ``part`` if there is a split.

        Raises:
            StoreError: a column that does not exist, or a split that does not know every sample.
        """
        conditions = {"label": label, "key": key, "shard": shard, "part": part}
        return find_rows(self.samples, conditions, where, split)

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

    def _checked(self, shards: Sequence[int] | None) -> list[int]:
        """Numbers of finished shards; refused if any is not."""
        numbers = self.shard_numbers if shards is None else [int(number) for number in shards]
        for number in numbers:
            self._layout.check_shard(number)
            if number not in self._markers:
                name = self._layout.shards[number][0]
                raise StoreError(
                    f"shard {number} ({name}) of the store {self.location} is not done: run `codec-dist extract`"
                )
        return numbers

    def _terms(self, layer: str, quantity: str) -> tuple[str, ...]:
        self._layout.channels(layer)
        return terms_of(quantity, self._layout.quantities)

    def _read_chunk(self, name: ChunkName) -> Chunk:
        marker = self._markers[name.shard_number]
        terms = self._terms(name.layer, name.quantity)
        arrays = (self._chunks.read_chunk(marker, name.layer, term, name.part) for term in terms)
        return Chunk(name, self.rows_of(name)[0], _joined(name.quantity, arrays))

    def _read_block(self, layer: str, quantity: str, number: int) -> np.ndarray:
        terms = self._terms(layer, quantity)
        return _joined(quantity, (self._chunks.read_block(self._markers[number], layer, term) for term in terms))


def _side_by_side(quantity: str) -> bool:
    return quantity.endswith("-both")


def _joined(quantity: str, arrays: Iterable[np.ndarray]) -> np.ndarray:
    """The rows of a quantity from those of the stored ones that make it."""
    if _side_by_side(quantity):
        return np.concatenate(list(arrays), axis=1)
    first, *others = arrays
    for other in others:
        first += other
    return first


# ---- Reading ahead in threads, in order and in bounded memory


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    *,
    budget: int,
    threads: int,
    weight: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Result]:
    """``read(item)`` of each item in order, read in threads while the caller works on earlier ones.

    Results in the caller's hands (the one given last), waiting and being read weigh at most ``budget`` together,
    or as much as the one in hand and the next, if that is more.
    """
    left = deque(items)
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = in_hand = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="store-reader") as pool:
        try:
            while left or waiting:
                while left and (not waiting or held + weight(left[0]) <= budget):
                    item = left.popleft()
                    held += weight(item)
                    waiting.append((weight(item), pool.submit(read, item)))
                taken, future = waiting.popleft()
                result = future.result()
                del future
                yield result
                # The caller let go of the one before when it took this one.
                del result
                held -= in_hand
                in_hand = taken
        finally:
            for _, future in waiting:
                future.cancel()
