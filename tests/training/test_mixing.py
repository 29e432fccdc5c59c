"""The order of streamed rows: a pure function of sizes and seeds, and how well it mixes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.training.rows import mixed_batches, permutation


def mixing_quality(pieces: np.ndarray, span: int) -> float:
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


def batches(sizes: list[int], capacity: int, batch_size: int, seed: int = 0, epoch: int = 0) -> list[torch.Tensor]:
    """Batches of the numbers of rows that come in pieces of these sizes."""
    rows = sum(sizes)
    return list(mixed_batches(torch.arange(rows).split(sizes), rows, capacity, batch_size, seed, epoch))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    capacity=st.integers(0, 200),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_every_row_comes_once_in_full_batches_whatever_the_sizes(
    sizes: list[int], capacity: int, batch_size: int, seed: int
) -> None:
    rows, found = sum(sizes), batches(sizes, capacity, batch_size, seed)
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    full, rest = divmod(rows, batch_size)
    assert [len(batch) for batch in found] == [batch_size] * full + [rest] * (rest > 0)


@given(capacity=st.integers(1, 80), batch_size=st.integers(1, 20), cuts=st.lists(st.integers(0, 100), max_size=6))
def test_the_order_does_not_depend_on_how_rows_are_cut_into_pieces(
    capacity: int, batch_size: int, cuts: list[int]
) -> None:
    whole = batches([100], capacity, batch_size)
    bounds = [0, *sorted(cuts), 100]
    cut = batches([end - start for start, end in itertools.pairwise(bounds)], capacity, batch_size)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    found = torch.cat(batches([50, 50], 30, 8, seed=2, epoch=3))
    assert torch.equal(found, torch.cat(batches([50, 50], 30, 8, seed=2, epoch=3)))
    assert not torch.equal(found, torch.cat(batches([50, 50], 30, 8, seed=2, epoch=4)))
    assert not torch.equal(found, torch.cat(batches([50, 50], 30, 8, seed=3, epoch=3)))


def test_no_more_rows_are_held_than_the_reservoir_has_room_for_and_each_waits_as_long_on_average() -> None:
    capacity, batch_size = 30, 8
    found = batches([4000], capacity, batch_size)
    for number, batch in enumerate(found):
        assert batch.max() < capacity + number * batch_size
    place = torch.empty(4000)
    place[torch.cat(found)] = torch.arange(4000.0)
    waits = (place - torch.arange(4000.0) + capacity)[1000:3000]
    assert waits.mean().item() == pytest.approx(capacity, rel=0.1)


def test_ranks_share_each_batch_in_order() -> None:
    rows = 101
    pieces = torch.arange(rows).split(17)
    first_half, second_half = (lambda count: slice(0, count // 2)), (lambda count: slice(count // 2, count))
    halves = [list(mixed_batches(pieces, rows, 40, 9, 3, 0, half)) for half in (first_half, second_half)]
    whole = list(mixed_batches(pieces, rows, 40, 9, 3, 0))
    assert len(halves[0]) == len(halves[1]) == len(whole)
    for first, second, batch in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([first, second]), batch)


def test_no_rows_give_no_batches() -> None:
    assert list(mixed_batches([], 0, 10, 4, 0, 0)) == []
    assert list(mixed_batches([torch.zeros(0, 3)], 0, 10, 4, 0, 0)) == []


def test_mixing_is_one_for_a_permutation_and_the_closed_form_for_no_mixing() -> None:
    pieces = np.repeat(np.arange(50), 200)
    shuffled = pieces[permutation(len(pieces), seed=0, epoch=0).numpy()]
    assert mixing_quality(shuffled, 100) == pytest.approx(1, abs=0.03)
    # In the order of the store a span of 100 rows lies in one piece: Σ p² = 1.
    together = (200 - 1) / (50 * 200 - 1)
    assert mixing_quality(pieces, 100) == pytest.approx(1 / 100 + (1 - 1 / 100) * together, rel=1e-12)
    # Pieces taken in turn are mixed better than by chance.
    assert mixing_quality(np.tile(np.arange(50), 200), 100) > 1.4


def test_mixing_is_the_variance_that_a_permutation_has_over_that_of_the_order() -> None:
    pieces = np.repeat(np.arange(40), 100)
    order = pieces[torch.cat(batches([100] * 40, 800, 50)).numpy()]
    values = np.random.default_rng(0).standard_normal((3000, 40))
    found = np.square(values[:, order].reshape(3000, -1, 50).mean(2)).mean()
    shuffled = np.random.default_rng(1).permutation(pieces)
    expected = np.square(values[:, shuffled].reshape(3000, -1, 50).mean(2)).mean()
    assert mixing_quality(order, 50) == pytest.approx(expected / found, rel=0.05)


def test_a_reservoir_mixes_better_the_larger_it_is_and_better_than_shuffled_windows() -> None:
    pieces = np.repeat(np.arange(64), 100)
    windows = np.concatenate(
        [np.random.default_rng(n).permutation(part) for n, part in enumerate(pieces.reshape(8, -1))]
    )
    qualities = [
        mixing_quality(pieces[torch.cat(batches([100] * 64, rows, 64)).numpy()], 64) for rows in (200, 800, 3200)
    ]
    assert qualities == sorted(qualities)
    assert qualities[1] > 1.3 * mixing_quality(windows, 64)
    assert qualities[2] > 0.85
