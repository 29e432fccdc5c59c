"""What a folder on disk promises the store: files whole or absent, exclusive names, and clear errors when it fills."""

import os
import threading

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import small_disk

from codec_dist.store import ContributionStore, Ledger, StoreError, StoreFullError, finish_store, verify_store
from codec_dist.store.place import LocalPlace, open_place
from codec_dist.store.zarr_view import ZarrView


@pytest.fixture
def place(tmp_path):
    return LocalPlace(tmp_path / "place")


@given(content=st.binary(max_size=200), start=st.integers(-250, 250), stop=st.none() | st.integers(0, 250))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranges_of_a_file_are_those_of_its_bytes(place, content, start, stop):
    place.write("a/b", content)
    assert place.read("a/b") == content
    begin = max(0, len(content) + start) if start < 0 else start
    assert place.read("a/b", start, stop) == content[begin : len(content) if stop is None else max(begin, stop)]
    assert place.size("a/b") == len(content)


@given(values=st.lists(st.floats(width=32), max_size=40), padding=st.integers(0, 50), wanted=st.integers(0, 60))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_are_written_with_their_padding_and_read_from_the_front(place, values, padding, wanted):
    array = np.array(values, "<f4")
    place.write_from("file", array, array.nbytes + padding)
    assert place.read("file") == array.tobytes() + bytes(padding)
    target, seen = np.full(wanted, 7, "<f4"), []
    read = place.read_into("file", target, lambda piece: seen.append(piece.tobytes()))
    expected = (array.tobytes() + bytes(padding))[: target.nbytes]
    assert read == len(expected)
    assert target.tobytes()[:read] == expected == b"".join(seen)


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(place):
    place.write("folder/file", b"old")

    def fail():
        with place.writing("folder/file") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert place.files() == {"folder/file": 3}
    with place.writing("folder/file") as file:
        file.write(b"newer")
    assert place.read("folder/file") == b"newer"
    assert place.files("folder") == {"folder/file": 5}


def test_of_many_that_create_a_file_one_alone_does(place):
    gate, made = threading.Barrier(16), []

    def create(number):
        gate.wait()
        if place.create("name", f"{number}".encode()):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert place.read("name") == f"{made[0]}".encode()
    assert list(place.files()) == ["name"]


def test_files_and_folders_are_removed_and_what_is_not_there_is_no_problem(place):
    for name in ("a/b/c", "a/d", "e"):
        place.write(name, b"x")
    place.delete("a")
    assert list(place.files()) == ["e"]
    place.delete("e")
    place.delete("e")
    assert place.files() == place.files("nowhere") == {}
    assert place.size("e") is place.age("e") is None
    with pytest.raises(FileNotFoundError):
        place.read("e")


def test_ages_are_counted_from_the_last_touch(place):
    place.write("file", b"x")
    os.utime(place.path / "file", (0, 0))
    age = place.age("file")
    assert age is not None
    assert age > 1e9
    place.touch("file", b"x")
    assert abs(place.age("file")) < 60


def test_zarr_finds_its_way_in_a_place(full):
    view = ZarrView(open_place(full.path), "arrays.zarr")
    group = zarr.open_group(view, mode="r")
    layers = group["layers"]
    assert sorted(name for name, _ in layers.members()) == ["blocks.0", "blocks.1@input%3Aheads"]
    np.testing.assert_array_equal(
        layers["blocks.0/activation/positive"][6:12], full.expected("blocks.0", "activation-positive", [1])
    )
    assert view == ZarrView(open_place(full.path), "arrays.zarr")
    assert "blocks.0" not in zarr.open_group(view, path="layers/blocks.0", mode="r")
    with pytest.raises((PermissionError, ValueError)):
        zarr.open_group(view, mode="r+").create_array("new", shape=(1,), dtype="f4")


@pytest.fixture
def disk(tmp_path):
    """A disk of its own of 512 KB."""
    with small_disk(tmp_path / "disk", "512k") as folder:
        yield folder


def test_a_disk_that_fills_is_a_clear_error_and_the_store_goes_on_when_there_is_space(disk, tmp_path, make_plan):
    shards = [(f"s-{number}.tar", 4) for number in range(8)]
    plan = make_plan(disk / "store", layers={"wide": 2000}, quantities=["activation-positive"], shards=shards)
    plan.create()
    filler = disk / "filler"
    filler.write_bytes(bytes(300 * 1024))

    def write_the_rest():
        for number in Ledger(plan.path).pending():
            plan.write(number)

    with pytest.raises(StoreFullError, match=r"cannot write shard .* No space left on device; free space"):
        write_the_rest()
    assert 0 < len(Ledger(plan.path).done()) < 8
    assert verify_store(plan.path).ok, "nothing half written is left"
    with pytest.raises(StoreError, match="is not complete"):
        finish_store(plan.path)
    filler.unlink()
    write_the_rest()
    other = make_plan(tmp_path / "other", layers=plan.layers, quantities=plan.quantities, shards=shards)
    other.create()
    for number in range(8):
        other.write(number)
    assert ContributionStore(plan.path).digest() == ContributionStore(other.path).digest()
