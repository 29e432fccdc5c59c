"""What verification promises: every kind of damage is found and named, and exactly what is damaged is made again."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codec_dist.store import ContributionStore, Ledger, StoreError, finish_store, repair_store, verify_store
from codec_dist.store import layout as layout_module

CHUNK = "arrays.zarr/layers/blocks.1@input%3Aheads/contribution/top_1/negative/c.1.0"
WHERE = (1, "s-1.tar", "blocks.1@input:heads", "contribution-negative")


@pytest.fixture
def finished(full):
    finish_store(full.path)
    return full


def places(found):
    return [(problem.shard_number, problem.shard, problem.layer, problem.quantity) for problem in found.problems]


def flip(path: Path, place: int = 7) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


def test_a_sound_store_is_found_sound(finished):
    for full in (True, False):
        counted = []
        found = verify_store(finished.path, full=full, on_shard=lambda counted=counted: counted.append(1))
        assert found.ok
        assert found.damaged == []
        assert (found.shards, found.shards_done, found.chunks, len(counted)) == (3, 3, 18, 3)
        assert "none" in str(found)


def test_shards_that_are_pending_are_told_and_are_no_problem(plan):
    plan.write(0)
    plan.write(1)
    (plan.path / "ledger" / "000001.json").unlink()  # killed between the samples and the marker
    found = verify_store(plan.path)
    assert found.ok
    assert "1 of 3 done, 2 pending" in str(found)


@pytest.mark.parametrize(
    ("damage", "by_name_and_size", "words"),
    [
        (lambda path: path.unlink(), True, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), True, "has 119 of 120 bytes"),
        (lambda path: path.write_bytes(b""), True, "has 0 of 120 bytes"),
        (flip, False, "the marker says"),
        (lambda path: path.write_bytes(bytes(120)), False, "the marker says"),
        (
            lambda path: path.write_bytes(Path(str(path).replace("c.1.0", "c.2.0")).read_bytes()[:20] * 6),
            False,
            "the marker says",
        ),
    ],
    ids=["missing", "short", "empty", "flipped bit", "zeros", "other rows"],
)
def test_a_damaged_chunk_is_named_by_shard_layer_and_quantity(finished, damage, by_name_and_size, words):
    damage(finished.path / CHUNK)
    for full in (True, False) if by_name_and_size else (True,):
        found = verify_store(finished.path, full=full)
        assert places(found) == [WHERE]
        assert found.damaged == [1]
        assert words in found.problems[0].found
        assert not found.ok
    assert all(word in str(found) for word in (*WHERE[1:], "extract", "1 shard is done again"))


def test_a_chunk_of_another_shard_is_told_as_such(tmp_path, make_plan):
    plan = make_plan(tmp_path / "store", shards=[("s-0.tar", 5), ("s-1.tar", 5)])
    plan.create()
    plan.write(0)
    plan.write(1)
    path = plan.path / CHUNK
    path.write_bytes(Path(str(path).replace("c.1.0", "c.0.0")).read_bytes())
    found = verify_store(plan.path)
    assert places(found) == [WHERE]
    assert found.problems[0].found.endswith("they are the rows of s-0.tar")


@pytest.mark.parametrize("damage", ["missing", "flipped", "of another shard", "short"])
def test_a_damaged_table_of_samples_is_found(finished, damage):
    path = finished.path / "samples" / "000001.parquet"
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip(path)
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_bytes((finished.path / "samples" / "000000.parquet").read_bytes())
    for full in (True, False):
        found = verify_store(finished.path, full=full)
        assert places(found) == [(1, "s-1.tar", "", "")]
        assert found.problems[0].kind == "samples"
        assert found.damaged == [1]
    (finished.path / "samples.parquet").unlink()
    with pytest.raises(StoreError, match=r"the samples of shard s-1.tar .* are damaged"):
        _ = ContributionStore(finished.path).samples


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_in_a_marker_makes_its_shard_pending(full, place, bit):
    path = full.path / "ledger" / "000001.json"
    content = path.read_bytes()
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    path.write_bytes(bytes(changed))
    try:
        same = json.loads(changed) == json.loads(content)  # a space that became another kind of space
    except ValueError:
        same = False
    try:
        found = verify_store(full.path)
        if not same:
            assert places(found) == [(1, "s-1.tar", "", "")]
            assert found.problems[0].kind == "marker"
            assert Ledger(full.path).pending() == [1]
    finally:
        path.write_bytes(content)


def test_markers_of_another_store_another_shard_or_lost_ones_are_found(finished, tmp_path, make_plan):
    other = make_plan(tmp_path / "other", identity={"model": "n"})
    other.create()
    other.write(0)
    ledger = finished.path / "ledger"
    (ledger / "000000.json").write_bytes((other.path / "ledger" / "000000.json").read_bytes())
    (ledger / "000001.json").write_bytes((ledger / "000002.json").read_bytes())
    (ledger / "000002.json").unlink()
    found = verify_store(finished.path)
    words = ["another identity", "is that of shard 2", "is missing in a finished store"]
    for problem, expected in zip(found.problems, words):
        assert problem.kind == "marker"
        assert expected in problem.found
    assert found.damaged == [0, 1, 2]


def test_stale_and_unexpected_files_are_told_apart_and_the_lease_is_neither(finished):
    stale = [
        "ledger/.000001.json.x7.partial",
        "arrays.zarr/layers/blocks.0/activation/positive/.c.1.0.123.partial",
        ".samples.parquet.9.partial",
        ".arrays.zarr.abc.partial/arrays.zarr/zarr.json",
    ]
    unexpected = [
        "notes.txt",
        "ledger/000099.json",
        "samples/1.parquet",
        "arrays.zarr/layers/blocks.0/activation/positive/c.3.0",
        "arrays.zarr/layers/blocks.0/activation/positive/c.01.0",
        "arrays.zarr/layers/blocks.7/activation/positive/zarr.json",
    ]
    for name in [*stale, *unexpected, "lease.json"]:
        (finished.path / name).parent.mkdir(parents=True, exist_ok=True)
        (finished.path / name).write_text("x")
    found = verify_store(finished.path)
    by_kind = {
        kind: sorted(problem.file for problem in found.problems if problem.kind == kind)
        for kind in ("stale", "unexpected")
    }
    assert by_kind == {"stale": sorted(stale), "unexpected": sorted(unexpected)}
    assert len(found.problems) == len(stale) + len(unexpected)
    assert repair_store(finished.path, found) == []
    left = verify_store(finished.path)
    assert sorted(problem.file for problem in left.problems) == sorted(unexpected)
    assert all((finished.path / name).exists() for name in unexpected), "what is not ours is not removed"


@pytest.mark.parametrize("damage", ["other order", "short", "flipped"])
def test_a_wrong_table_of_all_samples_is_found_and_made_again(finished, damage):
    path = finished.path / "samples.parquet"
    content, table = path.read_bytes(), pq.read_table(path)
    if damage == "other order":
        pq.write_table(table.take(np.arange(len(table))[::-1]), path)
    elif damage == "short":
        pq.write_table(table.slice(1), path)
    else:
        flip(path, len(content) // 3)
    found = verify_store(finished.path)
    assert [problem.kind for problem in found.problems] == ["table"]
    assert repair_store(finished.path, found) == []
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", ["missing", "not JSON", "another shape"])
def test_lost_metadata_of_an_array_are_found_and_written_again(finished, damage):
    digest = ContributionStore(finished.path).digest()
    path = finished.path / "arrays.zarr/layers/blocks.0/activation/positive/zarr.json"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "not JSON" else content.replace(b"18", b"12", 1))
    found = verify_store(finished.path)
    assert found.problems[0].kind == "metadata"
    assert {problem.quantity for problem in found.problems[1:]} == {"activation-positive"}
    repair_store(finished.path, found)
    assert path.read_bytes() == content
    for number in found.damaged:
        finished.write(number)
    assert ContributionStore(finished.path).digest() == digest


def test_repair_forgets_exactly_the_damaged_shards_and_writing_them_again_restores_the_store(finished):
    digest = ContributionStore(finished.path).digest()
    flip(finished.path / CHUNK)
    (finished.path / "samples" / "000002.parquet").unlink()
    marker = (finished.path / "ledger" / "000000.json").read_bytes()
    assert repair_store(finished.path, verify_store(finished.path)) == [1, 2]
    assert Ledger(finished.path).pending() == [1, 2]
    assert (finished.path / "ledger" / "000000.json").read_bytes() == marker
    assert not (finished.path / "samples.parquet").exists()
    for number in Ledger(finished.path).pending():
        finished.write(number)
    finish_store(finished.path)
    assert verify_store(finished.path).ok
    assert ContributionStore(finished.path).digest() == digest


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_in_valid_rows_is_found_and_one_in_the_padding_is_none(
    tmp_path_factory, monkeypatch, make_plan, data
):
    monkeypatch.setattr(layout_module, "LARGEST_CHUNK", 40)  # two rows a chunk
    plan = make_plan(tmp_path_factory.mktemp("bits") / "store", layers={"a": 5}, quantities=["activation-positive"])
    plan.create()
    for number in range(3):
        plan.write(number)
    number, byte, bit = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 119)), data.draw(st.integers(0, 7))
    chunk, place = divmod(byte, 40)
    path = plan.path / f"arrays.zarr/layers/a/activation/positive/c.{3 * number + chunk}.0"
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(bytes(content))
    valid = byte < plan.rows(number) * 20
    found = verify_store(plan.path)
    assert found.damaged == ([number] if valid else [])
    if valid:
        assert found.problems[0].file == str(path.relative_to(plan.path))
