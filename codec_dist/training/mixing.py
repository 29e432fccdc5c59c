"""The order in which the rows of an epoch come: pure functions of sizes and seeds, and how well one mixes."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from codec_dist.utils import derive_seed


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


def mixing_quality(pieces: Int[np.ndarray, "rows"], span: int) -> float:
    """How well an order mixes rows that come in pieces: 1 as a full permutation does, towards 0 the worse.

    With p the shares of the pieces in ``span`` rows that follow each other, Σ p² is the variance of a mean over
    these rows, for a quantity that is the same within each piece and independent between pieces (Kish 1965,
    "Survey Sampling": the design effect of clusters): shards sorted by class are such a case, shards that were
    shuffled when they were packed are not, and mix perfectly in any order. The result is this variance under a
    full permutation over that under the order: the factor by which a batch is effectively smaller.

    Args:
        pieces: number of the piece (shard, chunk) that each row comes from, in the order to judge.
        span: rows that follow each other; spans at the end that are not full do not count.
    """
    rows = len(pieces)
    span = min(span, rows)
    _, pieces, counts = np.unique(pieces, return_inverse=True, return_counts=True)
    together = (counts * (counts - 1.0)).sum() / max(rows * (rows - 1.0), 1.0)
    expected = (1 + (span - 1) * together) / span
    found = [
        np.square(np.bincount(pieces[start : start + span]) / span).sum() for start in range(0, rows - span + 1, span)
    ]
    return float(expected / np.mean(found))


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
