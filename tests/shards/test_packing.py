"""What packing promises: nothing lost, the same bytes each time, whole or absent, clear refusals."""

import dataclasses
import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from traced import peak_of

from codec_dist.shards import Sample, ShardError, ShardIndex, build_index, load_index, pack, read_shard
from codec_dist.shards.packing import Buckets

KEYS = st.text(
    st.characters(codec="utf-8", categories=("L", "N"), include_characters="-_% /"), min_size=1, max_size=150
)
USABLE_KEYS = KEYS.filter(lambda key: "" not in key.split("/") and not key.startswith("__") and key.isprintable())
PIXELS = st.integers(1, 6).flatmap(
    lambda width: st.binary(min_size=width, max_size=4 * width).map(
        lambda content: np.frombuffer(content[: len(content) // width * width], np.uint8).reshape(-1, width)
    )
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.dictionaries(
        USABLE_KEYS, st.tuples(PIXELS, st.none() | st.integers(0, 2**31 - 1)), min_size=1, max_size=12
    ),
    samples_per_shard=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_image_and_label_comes_back(tmp_path_factory, png, content, samples_per_shard, seed):
    folder = tmp_path_factory.mktemp("pack") / "shards"
    samples = [Sample(key, png(pixels), "png", label) for key, (pixels, label) in content.items()]
    index = pack(samples, folder, samples_per_shard=samples_per_shard, seed=seed)

    decoded = [item for info in index.shards for item in read_shard(folder, info)]
    assert {item.key: item.label for item in decoded} == {key: label for key, (_, label) in content.items()}
    for item in decoded:
        assert item.error is None
        np.testing.assert_array_equal(np.asarray(item.image), content[item.key][0])
    table = index.samples().to_pylist()
    assert [(row["key"], row["position"], row["label"]) for row in table] == [
        (item.key, item.position, item.label) for item in decoded
    ]
    assert all(info.samples == samples_per_shard for info in index.shards[:-1])


def test_packing_again_gives_the_same_bytes_whatever_the_order_of_the_source(tmp_path, samples_of):
    samples = samples_of(25)
    first = pack(samples, tmp_path / "a", samples_per_shard=10)
    second = pack(reversed(samples), tmp_path / "b", samples_per_shard=10)
    assert first.fingerprint == second.fingerprint
    for info in first.shards:
        assert (tmp_path / "a" / info.name).read_bytes() == (tmp_path / "b" / info.name).read_bytes()


def test_another_seed_gives_another_order_of_the_same_samples(tmp_path, samples_of):
    orders = [pack(samples_of(25), tmp_path / str(seed), seed=seed).samples()["key"].to_pylist() for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != sorted(orders[0])


def test_fingerprints_are_hashes_of_the_tars(packed):
    for info in packed.shards:
        content = Path(packed.location, info.name).read_bytes()
        assert (info.fingerprint, info.bytes) == (hashlib.sha256(content).hexdigest(), len(content))


def test_an_index_made_by_scanning_equals_the_one_made_while_packing(packed):
    table = packed.samples()
    scanned = build_index(packed.location)
    assert (scanned.shards, scanned.fingerprint, scanned.classes) == (
        packed.shards,
        packed.fingerprint,
        ("a", "b", "c"),
    )
    assert scanned.samples().equals(table)


def test_tars_carry_no_time_and_no_owner(packed):
    with tarfile.open(Path(packed.location, packed.shards[0].name)) as tar:
        entries = tar.getmembers()
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode) for entry in entries} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_index_files_are_plain_parquet(packed):
    shards = pq.read_table(Path(packed.location, "index.parquet"))
    samples = pq.read_table(Path(packed.location, "index-samples.parquet"))
    assert shards.column_names == ["name", "samples", "bytes", "fingerprint"]
    assert samples.column_names == ["shard", "position", "key", "label"]
    assert shards["samples"].to_pylist() == [10, 10, 5]


def test_packing_the_same_again_is_accepted_and_changes_nothing(packed, samples_of):
    times = {path: os.stat(path).st_mtime_ns for path in Path(packed.location).iterdir()}
    again = pack(samples_of(25), packed.location, samples_per_shard=10, classes=["a", "b", "c"])
    assert again == packed
    assert times == {path: os.stat(path).st_mtime_ns for path in Path(packed.location).iterdir()}


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples_per_shard": 5}, {"classes": ["x", "y", "z"]}, {"name": "n"}])
def test_a_folder_with_another_packing_is_refused(packed, samples_of, change):
    options = {"samples_per_shard": 10, "classes": ["a", "b", "c"]} | change
    with pytest.raises(ShardError, match="not empty and does not hold exactly this packing"):
        pack(samples_of(25), packed.location, **options)
    assert load_index(packed.location) == packed


def test_a_folder_with_other_files_is_refused_and_an_empty_one_is_filled(tmp_path, samples_of):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ShardError, match="not empty"):
        pack(samples_of(3), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert pack(samples_of(3), tmp_path / "empty").sample_count == 3


def test_a_source_that_fails_leaves_nothing_and_a_killed_packing_is_cleared(tmp_path, samples_of):
    def failing():
        yield from samples_of(5)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        pack(failing(), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".shards.partial").mkdir()
    (tmp_path / ".shards.partial" / "shard-000009.tar").write_bytes(b"half")
    index = pack(samples_of(5), tmp_path / "shards")
    assert [info.name for info in index.shards] == ["shard-000000.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def _sample(key="k", extension="png", label=None):
    return Sample(key, b"content", extension, label)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no images to pack"),
        ([_sample(), _sample()], "'k' occurs twice"),
        ([_sample(key="a.b")], r"'a\.b' cannot be used"),
        ([_sample(key="")], "cannot be used"),
        ([_sample(key="a//b")], "cannot be used"),
        ([_sample(key="/a")], "cannot be used"),
        ([_sample(key="__meta__")], "cannot be used"),
        ([_sample(key="a\nb")], "cannot be used"),
        ([_sample(extension="cls")], "'cls' of 'k' is not that of an image"),
        ([_sample(extension="p.ng")], "is not that of an image"),
        ([_sample(label=-1)], "label -1 of 'k' is out of range"),
        ([_sample(label=2)], r"label 2 of 'k' is out of range: expected 0 to 1"),
    ],
)
def test_unusable_samples_are_refused_with_one_clear_line(tmp_path, samples, message):
    with pytest.raises(ShardError, match=message) as caught:
        pack(samples, tmp_path / "shards", classes=["a", "b"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("options", "message"), [({"name": "a/b"}, "name 'a/b'"), ({"samples_per_shard": 0}, "0 samples")]
)
def test_unusable_options_are_refused(tmp_path, samples_of, options, message):
    with pytest.raises(ShardError, match=message):
        pack(samples_of(2), tmp_path / "shards", **options)


def test_unlabelled_samples_have_no_label_member_and_null_in_the_index(tmp_path, png):
    index: ShardIndex = pack([Sample("only", png(np.zeros((2, 2), np.uint8)), "png", None)], tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["only.png"]
        assert Image.open(io.BytesIO(tar.extractfile("only.png").read())).size == (2, 2)
    assert index.samples()["label"].to_pylist() == [None]
    assert index.classes is None


def by_tarfile(samples):
    """The bytes of a shard as the standard library writes them."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            label = [] if sample.label is None else [(f"{sample.key}.cls", str(sample.label).encode())]
            for name, data in [(f"{sample.key}.{sample.extension}", sample.image), *label]:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o644
                tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(USABLE_KEYS, st.tuples(st.binary(max_size=1300), st.none() | st.integers(0, 999)), min_size=1))
def test_tars_are_those_of_the_standard_library_byte_by_byte(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("pack") / "shards"
    index = pack([Sample(key, image, "png", label) for key, (image, label) in content.items()], folder)
    ordered = [
        Sample(key, content[key][0], "png", content[key][1]) for key in index.samples()["key"].to_pylist()
    ]  # fmt: skip
    assert (folder / "shard-000000.tar").read_bytes() == by_tarfile(ordered)


def test_the_order_is_that_of_sha256_of_seed_and_key(tmp_path, samples_of):
    samples = samples_of(40)
    keys = sorted((each.key for each in samples), key=lambda key: hashlib.sha256(f"7\x1f{key}".encode()).digest())
    assert pack(samples, tmp_path / "s", seed=7).samples()["key"].to_pylist() == keys


class Numbered:
    """A source that can be asked for any sample, and remembers what it was asked for."""

    def __init__(self, samples):
        self._samples, self.asked = samples, []

    def __len__(self):
        return len(self._samples)

    def __iter__(self):
        raise AssertionError("the images are read in their final order, once")

    def keys(self):
        return (sample.key for sample in self._samples)

    def read(self, numbers):
        self.asked += numbers
        return [self._samples[number] for number in numbers]


def test_a_source_by_number_is_read_once_in_the_final_order(tmp_path, samples_of):
    source = Numbered(samples_of(600))
    index = pack(source, tmp_path / "a", samples_per_shard=70)
    assert index == dataclasses.replace(
        pack(samples_of(600), tmp_path / "b", samples_per_shard=70), location=index.location, kept_in=index.kept_in
    )
    assert sorted(source.asked) == list(range(600))
    assert [f"image-{number:04d}" for number in source.asked] == index.samples()["key"].to_pylist()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([_sample(), _sample(key="l"), _sample()], "'k' occurs twice"),
        ([_sample(key="a.b")], r"'a\.b' cannot be used"),
        ([_sample(label=5)], "label 5 of 'k' is out of range"),
        ([], "no images to pack"),
    ],
)
def test_unusable_samples_of_a_source_by_number_are_refused(tmp_path, samples, message):
    with pytest.raises(ShardError, match=message):
        pack(Numbered(samples), tmp_path / "shards", classes=["a"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("buffer", [1, 2_000, 1 << 20])
def test_samples_leave_buckets_by_rank_whether_they_fit_into_memory_or_not(tmp_path, buffer):
    samples = [
        Sample(f"ü/{number}", bytes([number % 256]) * number, "png", number % 3 or None) for number in range(700)
    ]
    buckets = Buckets(tmp_path, 5, buffer)
    for sample in samples:
        buckets.add(sample)
    assert len(buckets) == 700
    assert bool(list(tmp_path.iterdir())) == (buffer < 1 << 20)
    ranks = {sample.key: hashlib.sha256(f"5\x1f{sample.key}".encode()).digest() for sample in samples}
    assert list(buckets.drain()) == sorted(samples, key=lambda sample: ranks[sample.key])
    assert list(tmp_path.iterdir()) == []


def test_a_stream_of_any_size_is_packed_in_bounded_memory(tmp_path):
    setup = """
import os
from codec_dist.shards import Sample, pack

def stream():
    block = os.urandom(1_000_000)
    for number in range(170):
        yield Sample(f"{number}", number.to_bytes(8, "big") + block, "png", None)
"""
    peak = peak_of(setup, "pack(stream(), sys.argv[1], samples_per_shard=50)", tmp_path / "shards")
    assert load_index(str(tmp_path / "shards")).sample_count == 170
    assert 1_000_000 < peak < 80_000_000, "of 170,000,000"
