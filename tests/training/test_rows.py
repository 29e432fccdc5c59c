"""Rows of a store as batches: resident or streamed, for any number of ranks and reading threads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.training.parts import read_parts
from codec_dist.training.rows import LayerRows, epoch_batches

SHARDS = (30, 30, 30, 13)


class OneOf(Ranks):
    """A rank that has others only in name: they say nothing to each other."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def layer_rows(
    run: Path,
    quantity: str = "contribution-positive",
    layer: str = "blocks.0",
    ranks: Ranks | None = None,
    **changes: object,
) -> LayerRows:
    store = ContributionStore(run / "store")
    parts = read_parts(store, run / "split.parquet")
    return LayerRows(store, layer, quantity, parts, ranks or Ranks(), **changes)


def epoch(rows: LayerRows, number: int = 0, seed: int = 5, batch_size: int = 8) -> list[torch.Tensor]:
    return [batch for (batch,), _ in epoch_batches([rows], Ranks(), seed, number, batch_size)]


def stored(run: Path, part: str, quantity: str = "contribution-positive", layer: str = "blocks.0") -> np.ndarray:
    store = ContributionStore(run / "store")
    return store.read(layer, quantity, read_parts(store, run / "split.parquet").indices[part])


def as_set(rows: torch.Tensor | np.ndarray) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("window_bytes", [1, 500, 1000, 1 << 20])
def test_every_fit_row_comes_once_an_epoch_in_a_new_order(make_run: Callable[..., Path], window_bytes: int) -> None:
    run = make_run(shard_sizes=SHARDS)
    resident, streamed = layer_rows(run), layer_rows(run, window_bytes=window_bytes)
    resident.load()
    for rows in (resident, streamed):
        epochs = [torch.cat(epoch(rows, number)) for number in range(3)]
        assert all(as_set(one) == as_set(stored(run, "fit")) for one in epochs)
        assert len({tuple(one[:, 0].tolist()) for one in epochs}) == 3
        assert torch.equal(torch.cat(epoch(rows, 1)), epochs[1])
        assert [len(batch) for batch in epoch(rows)] == [8] * 7 + [5]


@pytest.mark.parametrize("quantity", ["contribution-positive", "contribution-net", "contribution-both"])
def test_streamed_batches_are_the_same_bits_for_any_number_of_reading_threads(
    make_run: Callable[..., Path], quantity: str
) -> None:
    run = make_run(shard_sizes=(9,) * 12)
    one, *others = (
        [epoch(layer_rows(run, quantity, window_bytes=800, threads=threads), number) for number in range(2)]
        for threads in (1, 2, 5)
    )
    for other in others:
        for batches, expected in zip(other, one, strict=True):
            assert all(torch.equal(batch, same) for batch, same in zip(batches, expected, strict=True))


@pytest.mark.parametrize("resident", [True, False])
def test_ranks_take_equally_many_steps_and_together_the_batches_of_one(
    make_run: Callable[..., Path], resident: bool
) -> None:
    run = make_run(shard_sizes=SHARDS)
    found = []
    for ranks in (Ranks(), OneOf(0, 3), OneOf(1, 3), OneOf(2, 3)):
        rows = layer_rows(run, ranks=ranks, window_bytes=700)
        if resident:
            rows.load()
        found.append(list(epoch_batches([rows], ranks, 5, 0, 10)))
    alone, *shares = found
    assert {len(share) for share in shares} == {len(alone)}
    for (batch, size), *parts in zip(alone, *shares, strict=True):
        assert {total for _, total in parts} == {size} == {len(batch[0])}
        assert torch.equal(torch.cat([rows for (rows,), _ in parts]), batch[0])


@pytest.mark.parametrize("resident", [True, False])
def test_layers_get_the_same_samples_at_the_same_time_and_are_read_once(
    make_run: Callable[..., Path], resident: bool
) -> None:
    run = make_run(layers={"blocks.0": 8, "blocks.1": 8}, shard_sizes=SHARDS)
    layers = [layer_rows(run, layer=layer, window_bytes=700) for layer in ("blocks.0", "blocks.1")]
    if resident:
        for rows in layers:
            rows.load()
    values = [map(tuple, stored(run, "fit", layer=layer).tolist()) for layer in ("blocks.0", "blocks.1")]
    pairs = dict(zip(*values, strict=True))
    first, second = layers
    for (one, other, again), _ in epoch_batches([first, second, first], Ranks(), 5, 0, 8):
        assert again is one
        assert [pairs[tuple(row)] for row in one.tolist()] == [tuple(row) for row in other.tolist()]


def test_both_signs_lie_side_by_side(make_run: Callable[..., Path]) -> None:
    run = make_run()
    rows = layer_rows(run, "contribution-both")
    assert rows.channels == 16
    expected = np.concatenate([stored(run, "select"), stored(run, "select", "contribution-negative")], axis=1)
    streamed = torch.cat([values for values, _ in rows.held_out("select")])
    rows.load()
    resident = torch.cat([values for values, _ in rows.held_out("select")])
    for found in (streamed, resident):
        np.testing.assert_array_equal(found, expected)
    assert rows.bytes == 103 * 16 * 4


def test_calibration_and_held_out_rows_are_the_same_resident_or_streamed(make_run: Callable[..., Path]) -> None:
    run = make_run()
    resident, streamed = layer_rows(run), layer_rows(run)
    resident.load()
    assert resident.calibration().scale == streamed.calibration().scale
    assert torch.equal(resident.calibration().rows, streamed.calibration().rows)
    fit = stored(run, "fit").astype(np.float64)
    assert resident.calibration().scale == pytest.approx(fit.std(), rel=1e-12)
    np.testing.assert_allclose(resident.calibration().deviations, fit.std(0), rtol=1e-12)
    store = ContributionStore(run / "store")
    indices = read_parts(store, run / "split.parquet").indices["select"]
    labels = store.samples["label"].to_numpy()[indices]
    for rows in (resident, streamed):
        values, found = (torch.cat(pieces) for pieces in zip(*rows.held_out("select"), strict=True))
        np.testing.assert_array_equal(values, stored(run, "select"))
        np.testing.assert_array_equal(found, labels)


def test_values_beyond_the_type_of_training_are_named(make_run: Callable[..., Path]) -> None:
    rows = layer_rows(make_run(dtype="float64", value_scale=1e39))
    with pytest.raises(
        TrainingError, match=r"blocks\.0, contribution-positive: in torch\.float32, sample shard-000000/"
    ):
        rows.load()


def test_rows_that_are_all_equal_are_refused(make_run: Callable[..., Path]) -> None:
    rows = layer_rows(make_run(value_scale=0.0))
    with pytest.raises(TrainingError, match="all values of the 61 fit rows are equal"):
        rows.calibration()


STREAM = """
import json, sys
from pathlib import Path
from codec_dist.store import ContributionStore
from codec_dist.training.parts import read_parts
from codec_dist.training.collectives import Ranks
from codec_dist.training.rows import LayerRows, epoch_batches

def memory(line):
    return next(int(each.split()[1]) * 1024 for each in open("/proc/self/status") if each.startswith(line))

def stream(run):
    store = ContributionStore(run / "store")
    parts = read_parts(store, run / "split.parquet")
    rows = LayerRows(store, "wide", "activation-positive", parts, Ranks(), window_bytes=1 << 20)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before, seen = memory("VmRSS"), 0
    rows.calibration()
    for epoch in range(2):
        for (batch,), _ in epoch_batches([rows], Ranks(), 0, epoch, 64):
            seen += len(batch)
    return {"grown": memory("VmHWM") - before, "seen": seen, "bytes": rows.bytes}

print(json.dumps([stream(Path(run)) for run in sys.argv[1:]]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_of_streaming_does_not_grow_with_the_store(make_run: Callable[..., Path]) -> None:
    runs = [make_run(layers={"wide": 512}, shard_sizes=(300,) * shards, name=f"of-{shards}") for shards in (5, 6, 50)]
    # Freed arrays go back to the system at once, so that the peak is what is held, however busy the machine is.
    exact = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", STREAM, *map(str, runs)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | exact,
    )
    _, small, large = json.loads(done.stdout)  # the first one warms up
    assert large["seen"] == 2 * 50 * 180
    assert small["seen"] == 2 * 6 * 180
    assert large["bytes"] > 30e6
    # The rows of the calibration are at most 8 MB, twice while they are put together; the reservoir has 1 MiB and a
    # chunk 0.6 MB, of which a few are read ahead.
    assert small["grown"] < 24e6
    assert large["grown"] < 24e6
