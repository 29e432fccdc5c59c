"""What reading by chunks promises: the order asked, bounded memory, and the same numbers in every encoding."""

import itertools
import threading
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec_dist.store import ContributionStore, StoreError, verify_store
from codec_dist.store import layout as layout_module
from codec_dist.store.reading import read_ahead
from codec_dist.store.row_selection import spread_rows

MODEST = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def chunked(tmp_path, monkeypatch, make_plan):
    """A store of blocks with several chunks: two rows each in shards of 4, 6 and 1 samples, of which some are lost."""
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 40)
    plan = make_plan(tmp_path / "store", dropped={1: 1})
    plan.create()
    for number in range(3):
        plan.write(number)
    return plan


def test_chunks_come_in_the_order_of_rows_by_default(chunked):
    store = ContributionStore(chunked.path)
    names = store.chunk_names(["blocks.0"], ["activation-positive"])
    assert [(name.shard_number, name.part) for name in names] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
    chunks = list(store.chunks(names))
    assert [len(chunk.values) for chunk in chunks] == [2, 2, 2, 2, 1, 1]
    assert [chunk.start for chunk in chunks] == [0, 2, 4, 6, 8, 9]
    np.testing.assert_array_equal(
        np.concatenate([chunk.values for chunk in chunks]), chunked.expected("blocks.0", "activation-positive")
    )
    assert [store.rows_of(name) for name in names] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9), (9, 10)]


def test_chunks_of_several_arrays_are_neighbours_also_when_shuffled(chunked):
    store = ContributionStore(chunked.path)
    orders = set()
    for seed in range(8):
        names = store.chunk_names(["blocks.1@input:heads", "blocks.0"], ["contribution-net"], seed=seed)
        assert names == store.chunk_names(["blocks.1@input:heads", "blocks.0"], ["contribution-net"], seed=seed)
        rows = [name[:2] for name in names[::2]]
        assert [name[:2] for name in names[1::2]] == rows
        assert sorted(rows) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)]
        assert [name.layer for name in names] == ["blocks.1@input:heads", "blocks.0"] * 6
        orders.add(tuple(rows))
        for chunk in store.chunks(names):
            expected = store.read(chunk.name.layer, "contribution-net")[chunk.start : chunk.start + len(chunk.values)]
            np.testing.assert_array_equal(chunk.values, expected)
    assert len(orders) > 4


def test_any_given_order_is_kept(chunked):
    store = ContributionStore(chunked.path)
    names = store.chunk_names()[::-1] + store.chunk_names(shards=[2, 0])
    assert [chunk.name for chunk in store.chunks(names, in_memory=3, threads=3)] == names


def test_shards_that_are_not_done_have_no_chunks(chunked):
    (chunked.path / "ledger" / "000001.json").unlink()
    store = ContributionStore(chunked.path)
    names = store.chunk_names(["blocks.0"], ["activation-positive"])
    assert {name.shard_number for name in names} == {0, 2}
    with pytest.raises(StoreError, match=r"shard 1 \(s-1.tar\) .* is not done"):
        store.chunks([names[0]._replace(shard_number=1)])
    with pytest.raises(StoreError, match="no chunk 2 with valid rows in shard 0"):
        store.chunks([names[0]._replace(part=2)])
    with pytest.raises(StoreError, match="no layer 'x'"):
        store.chunk_names(["x"])


def test_damage_is_an_error_at_its_place(chunked):
    path = chunked.path / "arrays.zarr/layers/blocks.0/activation/positive/c.4.0"
    path.write_bytes(bytes(24))
    store = ContributionStore(chunked.path)
    names = store.chunk_names(["blocks.0"], ["activation-positive"])
    came = []
    with pytest.raises(StoreError, match=r"damaged in shard s-1.tar"):
        came.extend(chunk.name.part for chunk in store.chunks(names))
    np.testing.assert_array_equal(store.read("blocks.0", "activation-positive", np.array([0, 4, 9])).shape, (3, 3))
    with pytest.raises(StoreError, match="is damaged"):
        store.read("blocks.0", "activation-positive", np.array([7]))


class Thing:
    """Something whose life can be watched."""


@MODEST
@given(weights=st.lists(st.integers(1, 2), max_size=30), budget=st.integers(1, 9), threads=st.integers(1, 4))
def test_what_is_read_ahead_is_bounded_and_in_order(weights, budget, threads):
    alive = weakref.WeakValueDictionary()
    lock, peak = threading.Lock(), []

    def read(number):
        thing = Thing()
        thing.number = number
        with lock:
            alive[number] = thing
            peak.append(sum(weights[each] for each in list(alive)))
        return thing

    came = []
    for thing in read_ahead(
        range(len(weights)), read, budget=budget, threads=threads, weight=lambda number: weights[number]
    ):
        came.append(thing.number)
    assert came == list(range(len(weights)))
    two = max((a + b for a, b in itertools.pairwise(weights)), default=2)
    assert max(peak, default=0) <= max(budget, two)


def test_reading_ahead_stops_when_nobody_takes_any_more():
    read = []
    ahead = read_ahead(range(1000), read.append, budget=3, threads=2)
    next(ahead)
    ahead.close()
    assert len(read) <= 4


@MODEST
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    data=st.data(),
)
def test_rows_are_found_in_their_chunks(sizes, data):
    bounds = np.cumsum([0, *sizes])
    indices = st.lists(st.integers(0, int(bounds[-1]) - 1), max_size=20) if bounds[-1] else st.just([])
    chosen = np.array(data.draw(indices), np.int64)
    found = np.full(len(chosen), -1)
    for number, places, rows in spread_rows(chosen, bounds.tolist()):
        assert len(places)
        assert (rows < sizes[number]).all()
        found[places] = bounds[number] + rows
    np.testing.assert_array_equal(found, chosen)


def test_rows_are_found_by_class_key_shard_part_and_predicate(full, tmp_path):
    store = ContributionStore(full.path)
    samples = store.samples.to_pylist()
    split = store.samples.select(["shard", "key"]).append_column(
        "part", pa.array(["fit", "select", "evaluate"] * 3 + ["fit"] * 2)
    )
    pq.write_table(split.take(np.arange(11)[::-1]), tmp_path / "split.parquet")
    split_path = tmp_path / "split.parquet"

    def expected(condition):
        return [place for place, row in enumerate(samples) if condition(row)]

    assert store.find(label=2).tolist() == expected(lambda row: row["label"] == 2)
    assert store.find(label=[1, None]).tolist() == expected(lambda row: row["label"] in (1, None))
    assert store.find(key="key-1-3").tolist() == [7]
    assert store.find(key=["key-2-0", "key-0-1"]).tolist() == [1, 10]
    assert store.find(shard="s-1.tar", label=1).tolist() == expected(
        lambda row: row["shard"] == "s-1.tar" and row["label"] == 1
    )
    assert store.find(part="select", split=split_path).tolist() == [1, 4, 7]
    assert store.find(part=["select", "evaluate"], split=split, label=2).tolist() == [
        place for place in expected(lambda row: row["label"] == 2) if place % 3 and place < 9
    ]
    assert store.find(where=pc.field("target_value") > 0.5).tolist() == expected(lambda row: row["target_value"] > 0.5)
    assert store.find(where=pc.field("part") == "fit", split=split).tolist() == [0, 3, 6, 9, 10]
    assert store.find().tolist() == list(range(11))
    assert store.find(label=77).tolist() == []


def test_rows_cannot_be_found_by_what_is_not_there(full):
    store = ContributionStore(full.path)
    with pytest.raises(StoreError, match="give the split"):
        store.find(part="fit")
    with pytest.raises(StoreError, match="the samples have shard, key, label"):
        store.find(where=pc.field("colour") == 1)
    with pytest.raises(StoreError, match="cannot read the split"):
        store.find(part="fit", split=full.path / "nowhere.parquet")
    few = store.samples.select(["shard", "key"]).slice(1).append_column("part", pa.array(["fit"] * 10))
    with pytest.raises(StoreError, match=r"does not know key-0-0 of s-0\.tar"):
        store.find(part="fit", split=few)
    twice = pa.concat_tables([few, few.slice(0, 1), few])
    with pytest.raises(StoreError, match="does not know key-0-0"):
        store.find(part="fit", split=twice)
    whole = store.samples.select(["shard", "key"]).append_column("part", pa.array(["fit"] * 11))
    with pytest.raises(StoreError, match="lists samples twice"):
        store.find(part="fit", split=pa.concat_tables([whole, few]))


# All pairs of compression and sharding in one type of number, and each of both in the others.
ALL_FORMS = tuple(itertools.product(["none", "lz4", "zstd"], [None, 1, 4, 100]))
SOME_FORMS = (("none", 1), ("lz4", 4), ("zstd", 100), ("zstd", None))


@pytest.mark.parametrize(("dtype", "forms"), [("float16", SOME_FORMS), ("float32", ALL_FORMS), ("float64", SOME_FORMS)])
def test_compression_and_sharding_change_no_number_and_no_digest(tmp_path, monkeypatch, make_plan, dtype, forms):
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 48)
    plain = make_plan(tmp_path / "plain", dtype=dtype, dropped={1: 1})
    plain.create()
    for number in range(3):
        plain.write(number)
    expected = ContributionStore(plain.path)
    for compression, sharding in forms:
        packed = make_plan(tmp_path / f"{compression} {sharding}", dtype=dtype, dropped={1: 1})
        packed.create(compression=compression, sharding=sharding)
        for number in range(3):
            packed.write(number)
        store = ContributionStore(packed.path)
        assert store.digest() == expected.digest(), (compression, sharding)
        assert store.identity_hash == expected.identity_hash
        _check_values(store, packed)
        assert verify_store(packed.path).ok


def _check_values(store, packed):
    """The store reads as what was written, to this software and to Zarr."""
    for layer, name in packed.values(0):
        np.testing.assert_array_equal(store.read(layer, name), packed.expected(layer, name))
        # Zarr itself, which knows nothing of this software, reads the same.
        quantity = name.replace("-", "/").replace("contribution/", "contribution/top_1/")
        array = zarr.open_group(packed.path / "arrays.zarr", mode="r")[f"layers/{layer.replace(':', '%3A')}/{quantity}"]
        rows = store.samples["row"].to_numpy()
        np.testing.assert_array_equal(array[:][rows], packed.expected(layer, name))


@pytest.mark.parametrize("sharding", [None, 2])
@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_damage_of_encoded_chunks_is_found_and_written_over(tmp_path, make_plan, sharding, damage):
    plan = make_plan(tmp_path / "store")
    plan.create(compression="zstd", sharding=sharding)
    for number in range(3):
        plan.write(number)
    digest = ContributionStore(plan.path).digest()
    path = plan.path / "arrays.zarr/layers/blocks.0/activation/positive/c.1.0"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:20] + bytes([content[20] ^ 16]) + content[21:])
    found = verify_store(plan.path)
    assert found.damaged == [1]
    with pytest.raises(StoreError, match="is damaged"):
        ContributionStore(plan.path).read("blocks.0", "activation-positive")
    plan.write(1)
    assert path.read_bytes() == content, "the same numbers are the same bytes, whatever was there"
    assert ContributionStore(plan.path).digest() == digest


def test_sharded_blocks_are_one_file_each_and_compressed_ones_are_smaller(tmp_path, monkeypatch, make_plan):
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 40)
    sizes = {}
    for name, options in {"plain": {}, "lz4": {"compression": "lz4"}, "zstd": {"compression": "zstd"}}.items():
        plan = make_plan(tmp_path / name, layers={"wide": 3000}, quantities=["activation-positive"], shards=[("s", 8)])
        plan.create(sharding=4, **options)
        plan.write(0, values={("wide", "activation-positive"): np.tile(np.float32([0, 0, 1.5]), (8, 1000))})
        files = [path for path in (plan.path / "arrays.zarr").rglob("*") if path.name != "zarr.json" and path.is_file()]
        assert [path.name for path in files] == ["c.0.0"]
        sizes[name] = files[0].stat().st_size
        store = ContributionStore(plan.path)
        assert [store.rows_of(name) for name in store.chunk_names()] == [(0, 4), (4, 8)]
    assert max(sizes["lz4"], sizes["zstd"]) < sizes["plain"] / 10


def test_an_existing_store_keeps_its_encoding(tmp_path, make_plan):
    plan = make_plan(tmp_path / "store")
    plan.create(compression="lz4", sharding=2)
    plan.create()
    plan.write(0)
    info = ContributionStore(plan.path).info()
    assert (info.compression, info.sharded, info.chunk_rows) == ("lz4", True, 2)
    assert "compressed (lz4), one file per block" in str(info)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"compression": "gzip"}, "unknown compression 'gzip': choose one of none, lz4, zstd"),
        ({"sharding": 0}, "at least 1 row"),
    ],
)
def test_encodings_that_do_not_exist_are_refused(tmp_path, make_plan, option, message):
    with pytest.raises(StoreError, match=message):
        make_plan(tmp_path / "store").create(**option)
