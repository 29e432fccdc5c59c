"""The rows of one layer and quantity as training wants them: in memory or streamed, and in which order."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import UnfitRowsError
from codec_dist.training.parts import Parts
from codec_dist.utils import derive_seed

CALIBRATION_ROWS = 4096
STREAMED_WINDOW_BYTES = 512 << 20
READING_THREADS = 2
CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Calibration:
    """What an SAE starts from."""

    scale: float
    """Standard deviation over all elements of the fit rows."""
    deviations: Float[Tensor, "channels"]
    """Standard deviation of each channel over the fit rows."""
    rows: Float[Tensor, "rows channels"]
    """At most 4,096 fit rows, evenly spaced."""


class LayerRows:
    """One layer and quantity of a store, divided into the parts of the split.

    The batches of an epoch are a pure function of the seed, of the batch size and of whether the rows are
    resident. Resident rows (``load``) are permuted; rows that do not fit in memory come in whole chunks, in
    a random order, read ahead and mixed in a reservoir of ``window_bytes``. The number of reading threads
    and of ranks does not change a batch, of which each rank takes its share: so all take equally many
    steps. (Every rank that streams reads all chunks.) Held-out rows are this rank's share only.

    A quantity that ends in ``-both`` has the positive and the negative part side by side, positive first.
    """

    def __init__(
        self,
        store: ContributionStore,
        layer: str,
        quantity: str,
        parts: Parts,
        ranks: Ranks,
        *,
        dtype: torch.dtype = torch.float32,
        window_bytes: int = STREAMED_WINDOW_BYTES,
        threads: int = READING_THREADS,
    ) -> None:
        self._store, self._layer, self._quantity, self._dtype = store, layer, quantity, dtype
        self._ranks, self._window_bytes, self._threads = ranks, window_bytes, threads
        self._sources = _sources(quantity)
        self._labels, self._rows_by_part = parts.labels, dict(parts.indices)
        for part in ("select", "evaluate"):
            self._rows_by_part[part] = parts.indices[part][ranks.share(len(parts.indices[part]))]
        self._resident: dict[str, Float[Tensor, "rows channels"]] = {}
        self._calibration: Calibration | None = None

    @property
    def channels(self) -> int:
        """Numbers in a row."""
        return self._store.layers[self._layer] * len(self._sources)

    @property
    def fit_rows(self) -> int:
        """Rows of the fit part, on all ranks together."""
        return len(self._rows_by_part["fit"])

    @property
    def bytes(self) -> int:
        """What ``load`` would hold in memory."""
        return sum(map(len, self._rows_by_part.values())) * self._row_bytes

    @property
    def resident(self) -> bool:
        """Whether all rows are held in memory."""
        return bool(self._resident)

    def load(self) -> None:
        """Hold all rows in memory, on the rank's device; does nothing the second time.

        Raises:
            UnfitRowsError: a value that is NaN or infinite, or rows that are all equal.
        """
        if not self._resident:
            self._scan(keep=True)

    def unload(self) -> None:
        """Give the memory back."""
        self._resident = {}

    def calibration(self) -> Calibration:
        """Scale and first rows, from one pass over the fit rows (the same bits resident or streamed).

        Raises:
            UnfitRowsError: a value that is NaN or infinite, or rows that are all equal.
        """
        if self._calibration is None:
            self._scan(keep=False)
        assert self._calibration is not None
        return self._calibration

    def take(self, numbers: Int[Tensor, "batch"]) -> Float[Tensor, "batch channels"]:
        """Fit rows by number, of rows that are resident."""
        return self._resident["fit"].index_select(0, numbers)

    def streamed(self, seed: int, epoch: int, batch_size: int) -> Iterator[Float[Tensor, "share channels"]]:
        """The share of this rank in each batch of fit rows of one epoch, without holding all rows in memory."""
        chunks = self._pieces("fit", derive_seed(seed, "chunks", epoch))
        capacity = self._window_bytes // self._row_bytes
        pieces = (self._on_device(values) for _, values in chunks)
        return mixed_batches(pieces, self.fit_rows, capacity, batch_size, seed, epoch, self._ranks.share)

    def held_out(self, part: str) -> Iterator[tuple[Float[Tensor, "rows channels"], Tensor]]:
        """The share of this rank in a part's rows, and their labels, piece by piece; every row once."""
        if self._resident:
            labels = self._labels[torch.from_numpy(self._rows_by_part[part])]
            pieces = max(1, math.ceil(len(labels) / CALIBRATION_ROWS))
            yield from zip(self._resident[part].chunk(pieces), labels.chunk(pieces), strict=True)
            return
        for indices, values in self._pieces(part):
            yield self._on_device(values), self._labels[torch.from_numpy(indices)]

    @property
    def _row_bytes(self) -> int:
        return self.channels * self._dtype.itemsize

    def _pieces(self, part: str, seed: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices and values of a part's rows, chunk by chunk: in order, or with a seed in a random order."""
        rows = self._rows_by_part[part]
        for start, values in self._chunks(seed):
            first, last = np.searchsorted(rows, [start, start + len(values)])
            if last > first:
                indices = rows[first:last]
                yield indices, values if len(indices) == len(values) else values[indices - start]

    def _chunks(self, seed: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Place of the first row and values of every chunk, read ahead."""
        names = self._store.chunk_names([self._layer], self._sources, seed=seed)
        together = len(self._sources)
        chunks = self._store.chunks(names, in_memory=CHUNKS_AHEAD * together, threads=self._threads)
        for first in chunks:
            others = [chunk.values for chunk in islice(chunks, together - 1)]
            yield first.start, np.concatenate([first.values, *others], axis=1) if others else first.values

    def _scan(self, *, keep: bool) -> None:
        """One pass over the store: the calibration and, if asked, all rows."""
        spread = _Spread()
        stride = math.ceil(self.fit_rows / CALIBRATION_ROWS)
        samples: list[Tensor] = []
        kept = {part: self._empty(len(rows)) for part, rows in self._rows_by_part.items()} if keep else {}
        seen = 0
        for start, chunk in self._chunks():
            for part, rows in self._rows_by_part.items():
                first, last = np.searchsorted(rows, [start, start + len(chunk)])
                values = self._tensor(chunk[rows[first:last] - start])
                if not values.isfinite().all():
                    self._refuse_values(rows[first:last], values)
                if keep:
                    kept[part][first:last] = values
                if part == "fit" and len(values):
                    spread.update(values)
                    # A copy: a view would keep the whole chunk in memory.
                    samples.append(values[-seen % stride :: stride].clone().to(self._ranks.device))
                    seen += len(values)
        scale, deviations = spread.deviations()
        if not scale >= torch.finfo(self._dtype).tiny:
            found = f"differ by {scale:.1g}, too little for {self._dtype}" if scale > 0 else "are equal"
            raise UnfitRowsError(
                f"{self._layer}, {self._quantity}: all values of the {self.fit_rows} fit rows {found}, so there is "
                "nothing to decompose"
            )
        self._calibration = Calibration(scale, deviations.to(self._ranks.device), torch.cat(samples))
        self._resident = kept

    def _empty(self, rows: int) -> Float[Tensor, "rows channels"]:
        return torch.empty(rows, self.channels, device=self._ranks.device, dtype=self._dtype)

    def _tensor(self, values: np.ndarray) -> Float[Tensor, "rows channels"]:
        """On the CPU, in the type of the training."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._dtype)

    def _on_device(self, values: np.ndarray) -> Float[Tensor, "rows channels"]:
        return send(self._tensor(values), self._ranks.device)

    def _refuse_values(self, rows: np.ndarray, values: Tensor) -> None:
        row, channel = (~values.isfinite()).nonzero()[0].tolist()
        sample = self._store.samples.slice(int(rows[row]), 1).to_pylist()[0]
        raise UnfitRowsError(
            f"{self._layer}, {self._quantity}: in {self._dtype}, sample {sample['shard']}/{sample['key']} holds "
            f"{values[row, channel].item()} in channel {channel}: extract the store again without that sample"
        )


def epoch_batches(
    layers: Sequence[LayerRows], ranks: Ranks, seed: int, epoch: int, batch_size: int
) -> Iterator[tuple[list[Float[Tensor, "share channels"]], int]]:
    """The batches of one epoch: for each of ``layers`` this rank's share, and the rows of the whole batch.

    The layers belong to one store and one split, and are all resident or all streamed; they get the same
    samples at the same time. One that is named twice is read once.
    """
    distinct = list(dict.fromkeys(layers))
    rows = distinct[0].fit_rows
    batches: Iterator[tuple[Tensor, ...]]
    if distinct[0].resident:
        order = permutation(rows, seed, epoch).to(ranks.device).split(batch_size)
        batches = (tuple(layer.take(numbers[ranks.share(len(numbers))]) for layer in distinct) for numbers in order)
    else:
        batches = zip(*(layer.streamed(seed, epoch, batch_size) for layer in distinct), strict=True)
    for start, batch in zip(range(0, rows, batch_size), batches, strict=True):
        by_layer = dict(zip(distinct, batch, strict=True))
        yield [by_layer[layer] for layer in layers], min(batch_size, rows - start)


def _sources(quantity: str) -> list[str]:
    """The stored or derived quantities that lie side by side in a row."""
    kind = quantity.removesuffix("-both")
    return [f"{kind}-positive", f"{kind}-negative"] if kind != quantity else [quantity]


class _Spread:
    """Standard deviations in float64, merged piece by piece (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Float[Tensor, "rows channels"]) -> None:
        values = values.double()
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        if not self._count:
            self._count, self._mean, self._squares = len(values), mean, squares
            return
        count, difference = len(values), mean - self._mean
        total = self._count + count
        self._squares += squares + difference.square() * (self._count * count / total)
        self._mean += difference * (count / total)
        self._count = total

    def deviations(self) -> tuple[float, Float[Tensor, "channels"]]:
        """Over all elements, and of each channel; NaN without rows."""
        if not self._count:
            return math.nan, self._mean
        apart = (self._mean - self._mean.mean()).square().sum() * self._count
        total = (self._squares.sum() + apart) / (self._count * len(self._mean))
        return total.sqrt().item(), (self._squares / self._count).sqrt()


# ---- The order in which the rows of an epoch come: pure functions of sizes and seeds, and how well one mixes


def permutation(rows: int, seed: int, epoch: int) -> Int[Tensor, "rows"]:
    """The order of rows that are all in memory; drawn on the CPU, so that it is the same for every device."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "rows", epoch, 0))
    return torch.randperm(rows, generator=generator)


def mixed_batches(
    pieces: Iterable[Shaped[Tensor, "piece ..."]],
    rows: int,
    capacity: int,
    batch_size: int,
    seed: int,
    epoch: int,
    share: Callable[[int], slice] = slice,
) -> Iterator[Shaped[Tensor, "share ..."]]:
    """Batches of rows that come in pieces, mixed in a reservoir; every row once.

    The reservoir is filled with the first rows. Each batch is taken from ``batch_size`` different slots of it,
    drawn at random, into which the next rows of the stream go; once the stream has ended, what is left comes in
    a random order. So a row waits a random time of ``capacity`` rows on average, and a batch has rows from
    about twice as many pieces as the reservoir has room for. Only the last batch may be smaller.

    Args:
        pieces: all rows in order; let go of one by one.
        rows: how many there are.
        capacity: rows that the reservoir holds; at least a batch, and never more than ``rows``.
        batch_size: rows per batch.
        seed: of the order, which depends on all numbers given here, and not on how the rows are cut into pieces.
        epoch: likewise.
        share: the part wanted of so many rows of a batch; default: all.
    """
    random = np.random.default_rng(derive_seed(seed, "reservoir", epoch))
    capacity = min(rows, max(capacity, batch_size))
    stream = _Stream(pieces)
    reservoir = stream.take(capacity)
    if reservoir is None:
        return
    left = rows - capacity
    vacant: Int[Tensor, "slots"] = torch.empty(0, dtype=torch.int64)
    while left:
        slots = send(torch.from_numpy(random.choice(capacity, batch_size, replace=False)), reservoir.device)
        yield reservoir.index_select(0, slots[share(batch_size)])
        count = min(left, batch_size)
        stream.put(reservoir, slots[:count])
        left, vacant = left - count, slots[count:]
    held = np.setdiff1d(np.arange(capacity), vacant.cpu().numpy())
    for slots in torch.from_numpy(random.permutation(held)).to(reservoir.device).split(batch_size):
        yield reservoir.index_select(0, slots[share(len(slots))])


def send(tensor: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """A tensor of the host on ``device``; a GPU gets it without being waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _Stream:
    """Rows that come in pieces, taken in other portions."""

    def __init__(self, pieces: Iterable[Tensor]) -> None:
        self._pieces = iter(pieces)
        self._piece: Tensor | None = None

    def take(self, count: int) -> Tensor | None:
        """The next ``count`` rows in memory of their own; None where there are no rows."""
        first = next((piece for piece in self._pieces if len(piece)), None)
        if first is None:
            return None
        self._piece = first
        taken = first.new_empty(count, *first.shape[1:])
        start = 0
        while start < count:
            part = self._next(count - start)
            taken[start : start + len(part)] = part
            start += len(part)
        return taken

    def put(self, target: Tensor, slots: Int[Tensor, "slots"]) -> None:
        """Write the next rows into these rows of ``target``."""
        while len(slots):
            part = self._next(len(slots))
            target.index_copy_(0, slots[: len(part)], part)
            slots = slots[len(part) :]

    def _next(self, most: int) -> Tensor:
        """At least one row, at most so many."""
        while self._piece is None or not len(self._piece):
            self._piece = None  # let go of it before the next is fetched
            self._piece = next(self._pieces)
        part, self._piece = self._piece[:most], self._piece[most:]
        return part
