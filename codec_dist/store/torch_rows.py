"""Rows of a store as a torch data set: whole chunks are read, rows are shuffled in memory."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from codec_dist.store.errors import StoreError
from codec_dist.store.reading import Chunk, ChunkName, ContributionStore
from codec_dist.store.row_selection import spread_rows
from codec_dist.utils import derive_seed


class RowBatch(NamedTuple):
    """Some rows of some arrays."""

    indices: Int[Tensor, "batch"]
    """Places in the store's table of samples."""
    labels: Int[Tensor, "batch"]
    """−1 for samples without one."""
    values: dict[tuple[str, str], Float[Tensor, "batch channels"]]
    """(layer key, quantity) → the rows."""


class RowDataset(IterableDataset[RowBatch]):
    """Batches of rows of the finished shards, in a random order of chunks and of rows within a window of them.

    Give it to a ``DataLoader`` with ``batch_size=None``. Workers, and ranks, share the chunks among them, so that
    every row comes once per epoch. The order depends on seed, epoch, ranks and workers. Needs torch.

    Args:
        path: folder or URL of the store.
        layers: layer keys; by default all.
        quantities: quantities of each of them; by default all that are stored.
        batch_size: rows per batch; the last one of each worker may be smaller.
        seed: of the order; None: the order of the table of samples.
        in_memory: chunks of each array that every worker holds at once (at least 2): half of them are the
            window whose rows are shuffled, the others are read meanwhile.
        indices: the only rows that come, as ``ContributionStore.find`` gives them; by default all.
        rank: number of this process among ``ranks`` that share the rows.
        ranks: how many processes do.

    Raises:
        StoreError: ``path`` is not a store, holds no such array, or the numbers make no sense.
    """

    def __init__(
        self,
        path: str | Path,
        layers: Sequence[str] | None = None,
        quantities: Sequence[str] | None = None,
        *,
        batch_size: int,
        seed: int | None = 0,
        in_memory: int = 8,
        indices: Int[np.ndarray, "rows"] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size < 1 or in_memory < 2 or not 0 <= rank < ranks:
            raise StoreError(
                f"batch_size={batch_size}, in_memory={in_memory}, rank={rank} of {ranks} requested: a batch has at "
                "least 1 row, 2 chunks are held, and ranks count from 0"
            )
        self._path, self._layers, self._quantities = str(path), layers, quantities
        self._batch_size, self._seed, self._in_memory = batch_size, seed, in_memory
        self._indices = None if indices is None else np.unique(indices)
        self._rank, self._ranks = rank, ranks
        # In shared memory, so that workers that stay for several epochs learn of the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._store: ContributionStore | None = None
        self._open().chunk_names(layers, quantities)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[RowBatch]:
        store = self._open()
        labels = store.samples["label"].fill_null(-1).to_numpy().astype(np.int64)
        number, sharers = self._share()
        epoch, random = int(self._epoch), None
        if self._seed is not None:
            random = np.random.default_rng(derive_seed(self._seed, "rows", epoch, number, sharers))
        left: list[_Rows] = []
        for window in self._windows(store, epoch, number, sharers):
            rows = [*left, *window]
            count = sum(len(part.indices) for part in rows)
            order = np.arange(count) if random is None else random.permutation(count)
            full = count - count % self._batch_size
            for first in range(0, full, self._batch_size):
                yield _batch(_take(rows, order[first : first + self._batch_size]), labels)
            left = [_take(rows, order[full:])] if full < count else []
            # Before the next window is gathered: this is what bounds the memory.
            rows.clear()
            window.clear()
        for part in left:
            yield _batch(part, labels)

    def __getstate__(self) -> dict[str, Any]:
        # What reads files is opened again in each worker.
        return self.__dict__ | {"_store": None}

    def _open(self) -> ContributionStore:
        if self._store is None:
            self._store = ContributionStore(self._path)
        return self._store

    def _share(self) -> tuple[int, int]:
        """Number of this worker among all workers of all ranks, and how many these are."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        return self._rank * workers + worker, self._ranks * workers

    def _windows(self, store: ContributionStore, epoch: int, number: int, sharers: int) -> Iterator[list["_Rows"]]:
        """The rows of this worker's chunks, as many chunks at a time as are shuffled together."""
        seed = None if self._seed is None else derive_seed(self._seed, "epoch", epoch)
        names = store.chunk_names(self._layers, self._quantities, seed=seed)
        groups = [list(group) for _, group in groupby(names, key=lambda name: name[:2])]
        own = [group for group in groups[number::sharers] if len(self._kept(store, group[0]))]
        weight = sum(2 if name.quantity.endswith(("-net", "-both")) else 1 for name in own[0]) if own else 1
        in_window = self._in_memory // 2
        chunks = store.chunks(chain.from_iterable(own), in_memory=(self._in_memory - in_window) * weight)
        window: list[_Rows] = []
        for group in own:
            window.append(self._rows_of(store, list(islice(chunks, len(group)))))
            if len(window) == in_window:
                yield window
                window = []
        if window:
            yield window

    def _rows_of(self, store: ContributionStore, chunks: list[Chunk]) -> "_Rows":
        """The rows that were requested of one chunk of every array."""
        indices = self._kept(store, chunks[0].name)
        values = {(chunk.name.layer, chunk.name.quantity): chunk.values for chunk in chunks}
        if len(indices) < len(chunks[0].values):
            values = {name: array[indices - chunks[0].start] for name, array in values.items()}
        return _Rows(indices, values)

    def _kept(self, store: ContributionStore, name: ChunkName) -> Int[np.ndarray, "rows"]:
        start, stop = store.rows_of(name)
        if self._indices is None:
            return np.arange(start, stop)
        first, last = np.searchsorted(self._indices, [start, stop])
        return self._indices[first:last]


class _Rows(NamedTuple):
    """Rows of every array, by their places in the table of samples."""

    indices: np.ndarray
    values: dict[tuple[str, str], np.ndarray]


def _take(parts: list[_Rows], places: Int[np.ndarray, "batch"]) -> _Rows:
    """Rows at these places of the parts one after the other."""
    bounds = np.cumsum([0, *(len(part.indices) for part in parts)])
    spread = spread_rows(places, bounds.tolist())
    indices = np.empty(len(places), np.int64)
    values = {name: np.empty((len(places), array.shape[1]), array.dtype) for name, array in parts[0].values.items()}
    for number, targets, rows in spread:
        indices[targets] = parts[number].indices[rows]
        for name, array in values.items():
            array[targets] = parts[number].values[name][rows]
    return _Rows(indices, values)


def _batch(rows: _Rows, labels: Int[np.ndarray, "rows"]) -> RowBatch:
    values = {name: torch.from_numpy(array) for name, array in rows.values.items()}
    return RowBatch(torch.from_numpy(rows.indices), torch.from_numpy(labels[rows.indices]), values)
