"""What reading promises: valid rows only, in the order of samples, checked; and one digest for the same numbers."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec_dist.store import ContributionStore, RowSum, StoreError, finish_store
from codec_dist.store import layout as layout_module

MODEST = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MODEST
@given(
    counts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=4),
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    chunk=st.sampled_from([1, 40, 1 << 24]),
)
def test_what_was_written_is_read(tmp_path_factory, monkeypatch, make_plan, counts, channels, order, dtype, chunk):
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", chunk)
    plan = make_plan(
        tmp_path_factory.mktemp("round") / "store",
        layers={f"layer.{number}": count for number, count in enumerate(channels)},
        targets=("top_1", "top_5"),
        shards=[(f"s-{number}", rows + lost) for number, (rows, lost) in enumerate(counts)],
        dropped={number: lost for number, (_, lost) in enumerate(counts)},
        dtype=dtype,
    )
    plan.create()
    for number in order.sample(range(len(counts)), len(counts)):
        plan.write(number)
    finish_store(plan.path)
    store = ContributionStore(plan.path)
    assert store.complete
    assert len(store) == len(store.samples) == sum(rows for rows, _ in counts)
    keys = [f"key-{number}-{position}" for number in range(len(counts)) for position in range(plan.rows(number))]
    assert store.samples["key"].to_pylist() == keys
    for layer in plan.layers:
        for name in plan.names():
            np.testing.assert_array_equal(store.read(layer, name), plan.expected(layer, name))
        for block in store.blocks(layer, "activation-positive"):
            np.testing.assert_array_equal(block.values, plan.values(block.shard_number)[layer, "activation-positive"])
            assert keys[block.start : block.start + len(block.values)] == [
                key for key in keys if key.startswith(f"key-{block.shard_number}-")
            ]
        net = plan.expected(layer, "contribution[top_5]-positive") + plan.expected(
            layer, "contribution[top_5]-negative"
        )
        np.testing.assert_array_equal(store.read(layer, "contribution[top_5]-net"), net)
        both = store.read(layer, "contribution[top_5]-both")
        assert both.shape[1] == store.width(layer, "contribution[top_5]-both") == 2 * store.layers[layer]
        np.testing.assert_array_equal(both[:, : store.layers[layer]] + both[:, store.layers[layer] :], net)


@MODEST
@given(data=st.data())
def test_rows_are_read_in_any_order_asked(tmp_path_factory, make_plan, data):
    plan = make_plan(tmp_path_factory.mktemp("indices") / "store", dropped={1: 2})
    plan.create()
    for number in range(3):
        plan.write(number)
    store = ContributionStore(plan.path)
    indices = np.array(data.draw(st.lists(st.integers(0, len(store) - 1), max_size=20)), dtype=np.int64)
    for name in ("contribution-positive", "contribution-net"):
        np.testing.assert_array_equal(store.read("blocks.0", name, indices), store.read("blocks.0", name)[indices])


@pytest.mark.parametrize("indices", [[-1], [11], [0, 99]])
def test_indices_outside_the_table_are_refused(full, indices):
    with pytest.raises(StoreError, match="the store has 11 rows"):
        ContributionStore(full.path).read("blocks.0", "contribution-net", np.array(indices))


def test_samples_carry_everything_and_the_row_in_the_arrays(full):
    finish_store(full.path)
    store = ContributionStore(full.path)
    first = store.samples.slice(4, 1).to_pylist()[0]
    assert first == {
        "shard": "s-1.tar", "key": "key-1-0", "label": None, "prediction": 0, "target_value": 0.0,
        "baseline_value": 0.25, "row": 6, "completeness.blocks.0": 1.0,
    }  # fmt: skip
    assert store.block_rows == 6


def test_samples_are_the_same_before_and_after_finishing(full):
    before = ContributionStore(full.path).samples
    finish_store(full.path)
    assert (full.path / "samples.parquet").exists()
    assert ContributionStore(full.path).samples.equals(before)


def test_an_unfinished_store_shows_the_shards_that_are_done(plan):
    empty = ContributionStore(plan.path)
    assert (len(empty), empty.complete, empty.shard_numbers) == (0, False, [])
    assert empty.read("blocks.0", "contribution-net").shape == (0, 3)
    assert empty.samples.num_rows == 0
    plan.write(2)
    plan.write(0)
    store = ContributionStore(plan.path)
    assert (len(store), store.complete, store.shard_numbers) == (5, False, [0, 2])
    expected = plan.expected("blocks.0", "activation-positive", [0, 2])
    np.testing.assert_array_equal(store.read("blocks.0", "activation-positive"), expected)
    assert [(block.shard_number, block.start) for block in store.blocks("blocks.0", "activation-positive")] == [
        (0, 0),
        (2, 4),
    ]
    with pytest.raises(StoreError, match=r"shard 1 \(s-1.tar\) of the store .* is not done"):
        store.blocks("blocks.0", "activation-positive", shards=[1])
    assert "2 of 3 done (1 pending)" in str(store.info())


def test_shards_may_be_chosen_and_ordered(full):
    store = ContributionStore(full.path)
    blocks = list(store.blocks("blocks.0", "contribution-positive", shards=[2, 0]))
    assert [(block.shard_number, block.start) for block in blocks] == [(2, 10), (0, 0)]


@pytest.mark.parametrize(
    ("layer", "quantity", "message"),
    [
        ("block.0", "contribution-net", r"no layer 'block.0': did you mean blocks.0"),
        ("blocks.0", "contribution-positve", "no quantity 'contribution-positve': did you mean contribution-positive"),
        ("blocks.0", "activation-net", "no quantity 'activation-net'"),
        ("blocks.0", "contribution", "no quantity 'contribution'"),
        ("blocks.0", "contribution[top_2]-net", r"no quantity 'contribution\[top_2\]-net'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(full, layer, quantity, message):
    store = ContributionStore(full.path)
    with pytest.raises(StoreError, match=message):
        store.blocks(layer, quantity)
    with pytest.raises(StoreError, match=message):
        store.read(layer, quantity)


def test_the_first_target_may_be_named(full):
    store = ContributionStore(full.path)
    for sign in ("positive", "negative", "net"):
        np.testing.assert_array_equal(
            store.read("blocks.0", f"contribution[top_1]-{sign}"), store.read("blocks.0", f"contribution-{sign}")
        )


CHUNK = "arrays.zarr/layers/blocks.0/contribution/top_1/positive/c.1.0"


@pytest.mark.parametrize("damage", ["missing", "flipped", "foreign"])
def test_lost_torn_and_foreign_chunks_are_errors_not_zeros(full, damage):
    path = full.path / CHUNK
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        path.write_bytes((full.path / CHUNK.replace("c.1.0", "c.0.0")).read_bytes())
    store = ContributionStore(full.path)
    with pytest.raises(
        StoreError, match=r"contribution-positive of layer 'blocks.0' is damaged in shard s-1.tar: found "
    ):
        store.read("blocks.0", "contribution-positive")
    with pytest.raises(StoreError, match="is damaged"):
        store.digest()
    assert store.read("blocks.0", "contribution-positive", np.array([0, 10])).shape == (2, 3), "other blocks are whole"
    full.write(1)
    np.testing.assert_array_equal(
        ContributionStore(full.path).read("blocks.0", "contribution-positive"),
        full.expected("blocks.0", "contribution-positive"),
    )


def test_a_torn_chunk_is_a_store_error(full):
    path = full.path / CHUNK
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(StoreError, match=r"is damaged in shard s-1.tar: found 10 of 72 bytes"):
        ContributionStore(full.path).read("blocks.0", "contribution-positive")


def test_a_lost_table_of_samples_is_a_store_error(full):
    (full.path / "samples" / "000001.parquet").unlink()
    with pytest.raises(StoreError, match=r"shard s-1.tar in .* found no file samples/000001.parquet"):
        _ = ContributionStore(full.path).samples
    (full.path / "samples" / "000001.parquet").write_bytes((full.path / "samples" / "000000.parquet").read_bytes())
    with pytest.raises(StoreError, match=r"found crc32c:.* in samples/000001.parquet, the marker says"):
        _ = ContributionStore(full.path).samples


def slow_digest(plan):
    """The documented formula, row by row, from the numbers that were to be written."""
    total = 0
    for number, (shard, _) in enumerate(plan.shards):
        for (layer, name), values in plan.values(number).items():
            kind, sign = name.split("-")
            full_name = f"contribution[top_1]-{sign}" if kind == "contribution" else name
            for position, row in enumerate(values):
                text = json.dumps([shard, f"key-{number}-{position}", layer, full_name])
                content = text.encode() + b"\x00" + b"".join(np.dtype("<f4").type(value).tobytes() for value in row)
                total += int(hashlib.sha256(content).hexdigest(), 16)
    return f"{total % 2**256:064x}"


def test_the_digest_is_the_documented_sum(full):
    assert ContributionStore(full.path).digest() == slow_digest(full)


def test_the_digest_does_not_depend_on_chunks_block_size_or_order_of_writing(full, tmp_path, make_plan, monkeypatch):
    digest = ContributionStore(full.path).digest()
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 40)
    other = make_plan(tmp_path / "other", shards=[*full.shards, ("larger.tar", 9)], dropped={3: 9})
    other.create()
    for number in (3, 1, 2, 0):
        other.write(number, seconds=number / 2, attempt=2)
    store = ContributionStore(other.path)
    assert store.info().chunk_rows == 2
    assert store.digest() == digest


def test_the_digest_does_not_depend_on_the_order_of_rows(full):
    total = RowSum()
    for number in (2, 0, 1):
        for (layer, name), values in full.values(number).items():
            full_name = name.replace("contribution-", "contribution[top_1]-")
            keys = full.samples(number)["key"].to_pylist()
            for position in np.random.default_rng(0).permutation(len(keys)):
                row = values[position : position + 1]
                total.update(full.shards[number][0], [keys[position]], layer, full_name, row)
    assert total.result() == ContributionStore(full.path).digest()


@pytest.mark.parametrize("change", ["value", "zero sign", "key", "swap"])
def test_the_digest_notices_any_change(full, change):
    digest = ContributionStore(full.path).digest()
    values, samples = full.values(1), full.samples(1)
    array = values["blocks.0", "activation-positive"]
    if change == "value":
        array[3, 1] = np.nextafter(array[3, 1], np.float32(2))
    elif change == "zero sign":
        array[3, 1] = 0.0
        full.write(1, values=values)
        digest = ContributionStore(full.path).digest()
        array[3, 1] = -0.0
    elif change == "key":
        samples = samples.set_column(0, "key", [[f"other-{position}" for position in range(6)]])
    else:
        array[[0, 1]] = array[[1, 0]]
    full.write(1, values=values, samples=samples)
    assert ContributionStore(full.path).digest() != digest


def test_partial_sums_of_a_digest_merge(full):
    parts = [RowSum(), RowSum()]
    whole = RowSum()
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    keys = list("abcd")
    whole.update("s", keys, "l", "q", rows)
    parts[0].update("s", keys[:1], "l", "q", rows[:1])
    parts[1].update("s", keys[1:], "l", "q", rows[1:])
    parts[0].merge(parts[1])
    assert parts[0].result() == whole.result()


def test_info_is_a_table_for_people(full):
    full.dropped = {1: 2}
    full.write(1, seconds=1.5)
    info = ContributionStore(full.path).info()
    assert (info.shards, info.shards_done, info.samples, info.dropped, info.complete) == (3, 3, 9, 2, True)
    assert info.bytes == 3 * 6 * (3 + 5) * 3 * 4
    text = str(info)
    for part in ("3 of 3 done (complete)", "9 (2 dropped)", "blocks.1@input:heads", "5 channels", "float32", "1.5 s"):
        assert part in text
