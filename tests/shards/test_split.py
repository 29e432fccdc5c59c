"""What the split promises: three disjoint parts, by seed and key alone, even within every class."""

import collections

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_dist.shards import ShardError, make_split

ROWS = st.lists(
    st.tuples(st.sampled_from(["s-0", "s-1", "s-2"]), st.integers(0, 10_000), st.none() | st.integers(0, 3)),
    unique_by=lambda row: row[:2],
    max_size=150,
)
FRACTIONS = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(
    lambda cuts: (min(cuts) / 100, (max(cuts) - min(cuts)) / 100, 1 - max(cuts) / 100)
)


def table_of(rows):
    shards, keys, labels = zip(*rows) if rows else ((), (), ())
    return pa.table(
        {
            "shard": pa.array(shards, pa.string()),
            "position": pa.array(range(len(rows)), pa.int32()),
            "key": pa.array([f"key-{key}" for key in keys], pa.string()),
            "label": pa.array(labels, pa.int32()),
        }
    )


@settings(deadline=None)
@given(ROWS, FRACTIONS, st.integers(0, 2**31 - 1))
def test_parts_cover_all_samples_and_share_every_class_within_one_sample(rows, fractions, seed):
    split = make_split(table_of(rows), *fractions, seed)
    assert split.column_names == ["shard", "key", "label", "part"]
    assert split.drop(["part"]).equals(table_of(rows).drop(["position"]))
    counts = collections.Counter(zip(split["label"].to_pylist(), split["part"].to_pylist()))
    sizes = collections.Counter(split["label"].to_pylist())
    for label, size in sizes.items():
        for part, fraction in zip(("fit", "select", "evaluate"), fractions):
            assert abs(counts[label, part] - fraction * size) < 1 + 1e-6
    assert set(split["part"].to_pylist()) <= {"fit", "select", "evaluate"}


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms(use_true_random=False), st.integers(0, 100))
def test_the_order_of_samples_does_not_matter(rows, random, seed):
    shuffled = random.sample(rows, len(rows))
    one, other = (make_split(table_of(some), 0.6, 0.2, 0.2, seed).to_pylist() for some in (rows, shuffled))
    assert {(row["shard"], row["key"]): row["part"] for row in one} == {
        (row["shard"], row["key"]): row["part"] for row in other
    }


def test_the_shards_do_not_matter_where_keys_differ():
    rows = [("s-0", number, number % 3) for number in range(200)]
    repacked = [(f"t-{number % 7}", number, number % 3) for number in range(200)]
    one, other = (make_split(table_of(some), 0.6, 0.2, 0.2, 5)["part"].to_pylist() for some in (rows, repacked))
    assert one == other


def test_seeds_give_different_splits():
    table = table_of([("s-0", number, 0) for number in range(100)])
    splits = [make_split(table, 0.5, 0.25, 0.25, seed)["part"].to_pylist() for seed in range(3)]
    assert splits[0] != splits[1] != splits[2]


def test_many_classes_of_one_sample_still_fill_every_part():
    table = table_of([("s-0", number, number) for number in range(2000)])
    counts = collections.Counter(make_split(table, 0.6, 0.2, 0.2, 0)["part"].to_pylist())
    assert counts["fit"] == pytest.approx(1200, abs=100)
    assert counts["select"] == pytest.approx(400, abs=80)
    assert counts["evaluate"] == pytest.approx(400, abs=80)


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_do_not_add_up_are_refused(fractions):
    with pytest.raises(ShardError, match="add up to 1"):
        make_split(table_of([("s", 1, 0)]), *fractions, 0)
