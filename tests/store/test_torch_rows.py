"""What the torch data set promises: every row once per epoch, however many workers and ranks; shuffled, bounded."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from traced import peak_of

from codec_dist.store import ContributionStore, RowBatch, RowDataset, StoreError
from codec_dist.store import layout as layout_module

MODEST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_plan):
    """Seven chunks and more: two rows each, shards of 4, 6, 1 and 9 samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "LARGEST_CHUNK", 40)
        shards = [("s-0.tar", 4), ("s-1.tar", 6), ("s-2.tar", 1), ("s-3.tar", 9)]
        plan = make_plan(tmp_path_factory.mktemp("rows") / "store", shards=shards, dropped={3: 2})
        plan.create()
        for number in range(4):
            plan.write(number)
        yield ContributionStore(plan.path)


def indices(batches):
    return [place for batch in batches for place in batch.indices.tolist()]


def check(store, batches, quantities):
    labels = store.samples["label"].fill_null(-1).to_numpy()
    expected = {(layer, name): store.read(layer, name) for layer in store.layers for name in quantities}
    for batch in batches:
        assert isinstance(batch, RowBatch)
        assert list(batch.values) == list(expected)
        assert batch.labels.tolist() == labels[batch.indices.numpy()].tolist()
        for name, values in batch.values.items():
            np.testing.assert_array_equal(values.numpy(), expected[name][batch.indices.numpy()])


@MODEST
@given(
    batch_size=st.integers(1, 20),
    in_memory=st.integers(2, 9),
    seed=st.none() | st.integers(0, 99),
    ranks=st.integers(1, 3),
    subset=st.none() | st.sets(st.integers(0, 17)),
)
def test_every_row_comes_once_with_its_label_and_all_its_values(store, batch_size, in_memory, seed, ranks, subset):
    quantities = ["activation-positive", "contribution-net"]
    chosen = None if subset is None else np.array(sorted(subset), np.int64)
    came = []
    for rank in range(ranks):
        rows = RowDataset(
            store.path, None, quantities, batch_size=batch_size, seed=seed, in_memory=in_memory, indices=chosen,
            rank=rank, ranks=ranks,
        )  # fmt: skip
        batches = list(rows)
        check(store, batches, quantities)
        assert all(len(batch.indices) == batch_size for batch in batches[:-1])
        came += indices(batches)
    assert sorted(came) == sorted(range(len(store)) if subset is None else subset)
    if seed is None and ranks == 1:
        assert came == sorted(came)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_the_rows_and_learn_of_the_epoch(store, persistent):
    rows = RowDataset(store.path, ["blocks.0"], ["activation-positive"], batch_size=3, seed=1)
    loader = DataLoader(rows, batch_size=None, num_workers=2, persistent_workers=persistent)
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        batches = list(loader)
        orders.append(indices(batches))
        assert sorted(orders[-1]) == list(range(len(store)))
        np.testing.assert_array_equal(
            batches[0].values["blocks.0", "activation-positive"].numpy(),
            store.read("blocks.0", "activation-positive", batches[0].indices.numpy()),
        )
    assert orders[0] == orders[2] != orders[1]


def test_rows_of_a_window_are_mixed_and_the_order_depends_on_seed_and_epoch_alone(store):
    def order(seed, epoch=0):
        rows = RowDataset(store.path, ["blocks.0"], ["activation-positive"], batch_size=6, seed=seed, in_memory=6)
        rows.set_epoch(epoch)
        return indices(rows)

    assert order(0) == order(0)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, 1))}) == 3
    chunks = [place // 2 for place in order(0)]
    assert any(a != b for a, b in zip(chunks[::2], chunks[1::2]))


def test_it_travels_without_its_open_files(store):
    rows = RowDataset(str(store.path), ["blocks.0"], ["activation-positive"], batch_size=4, seed=3)
    before = indices(rows)
    assert indices(pickle.loads(pickle.dumps(rows))) == before  # noqa: S301


def test_shards_that_are_not_done_are_passed_over(plan):
    plan.write(1)
    rows = RowDataset(plan.path, ["blocks.0"], ["activation-positive"], batch_size=4)
    assert sorted(indices(rows)) == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"in_memory": 1}, "in_memory=1"),
        ({"rank": 2, "ranks": 2}, "rank=2 of 2"),
        ({"layers": ["x"]}, "no layer 'x'"),
        ({"quantities": ["x"]}, "no quantity 'x'"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(store, options, message):
    with pytest.raises(StoreError, match=message):
        RowDataset(store.path, **{"batch_size": 2} | options)


def test_memory_is_bounded_by_the_stated_number_of_chunks(tmp_path, make_plan):
    """Traced by numpy's own accounting; a store of 20 chunks of 512 KiB."""
    chunk = 2**19
    plan = make_plan(
        tmp_path / "store", layers={"wide": 1024}, quantities=["activation-positive"],
        shards=[(f"s-{number}", 128) for number in range(20)],
    )  # fmt: skip
    plan.create()
    for number in range(20):
        plan.write(number)
    # Chunks are cut as small there as here.
    setup = f"""
from codec_dist.store import RowDataset, layout
layout.LARGEST_CHUNK = {layout_module.LARGEST_CHUNK}
rows = RowDataset(sys.argv[1], batch_size=32, in_memory=4)
next(iter(rows))
"""
    # 4 chunks, a batch or two, the rows left over.
    assert peak_of(setup, "for _ in rows: pass", plan.path) < 5 * chunk
    assert isinstance(RowDataset(plan.path, batch_size=32), torch.utils.data.IterableDataset)
