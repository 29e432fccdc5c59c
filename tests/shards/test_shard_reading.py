"""What reading promises: every sample in order, bad ones as items, and never fewer without an error."""

import dataclasses
import gc
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec_dist.shards import ShardError, load_index, read_shard


def oracle(path):
    """(key, label, pixels) of a tar by the standard library alone, assuming KEY.png and KEY.cls."""
    with tarfile.open(path) as tar:
        contents = {name: tar.extractfile(name).read() for name in tar.getnames()}
    return [
        (name[:-4], int(contents[name[:-4] + ".cls"]), np.asarray(Image.open(io.BytesIO(content))))
        for name, content in contents.items()
        if name.endswith(".png")
    ]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_samples_come_decoded_and_in_the_order_of_the_tar(packed, threads):
    for info in packed.shards:
        items = list(read_shard(packed.location, info, threads=threads))
        expected = oracle(Path(packed.location, info.name))
        assert [(item.position, item.key, item.label, item.error) for item in items] == [
            (position, key, label, None) for position, (key, label, _) in enumerate(expected)
        ]
        for item, (_, _, pixels) in zip(items, expected):
            np.testing.assert_array_equal(np.asarray(item.image), pixels)


def cut_positions(path):
    """Where to cut, and how many samples can be read then."""
    with tarfile.open(path) as tar:
        members = {entry.name: entry for entry in tar.getmembers()}
    images = [entry for name, entry in members.items() if name.endswith(".png")]
    label = members[images[6].name[:-4] + ".cls"]
    return {
        # The sample before the cut may be incomplete: it does not count, unless another has begun.
        "boundary": (images[4].offset, 3),
        "header": (images[5].offset + 100, 4),
        "data": (images[6].offset_data + 10, 6),
        "label": (label.offset_data, 6),
        "between": (label.offset, 6),
        "first header": (20, 0),
        "everything": (0, 0),
    }


@pytest.mark.parametrize("where", ["boundary", "header", "data", "label", "between", "first header", "everything"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_tar_cut_short_is_an_error_that_names_shard_and_counts(packed, where, threads):
    info = packed.shards[0]
    path = Path(packed.location, info.name)
    position, readable = cut_positions(path)[where]
    path.write_bytes(path.read_bytes()[:position])
    with pytest.raises(ShardError) as caught:
        list(read_shard(packed.location, info, threads=threads))
    message = str(caught.value)
    assert f"{path} is cut short" in message
    assert f"{readable} samples in {position:,} bytes found, the index says 10 in {info.bytes:,}" in message
    assert "\n" not in message


@pytest.mark.parametrize("where", ["boundary", "header", "data"])
def test_a_cut_that_keeps_the_size_is_an_error_too(packed, where):
    info = packed.shards[0]
    path = Path(packed.location, info.name)
    position, _ = cut_positions(path)[where]
    content = path.read_bytes()
    garbage = {"boundary": b"\0", "header": b"\xff", "data": b"\0"}[where]
    path.write_bytes(content[:position] + garbage * (len(content) - position))
    with pytest.raises(ShardError, match=r"readable samples where the index says 10|another fingerprint"):
        list(read_shard(packed.location, info))


def test_a_tar_with_fewer_samples_than_its_index_says_is_an_error(packed):
    info = dataclasses.replace(packed.shards[0], samples=12)
    seen = []
    with pytest.raises(ShardError, match=r"shard-000000.tar holds 10 readable samples where the index says 12"):
        seen.extend(read_shard(packed.location, info))


def test_changed_bytes_are_noticed_by_the_fingerprint(packed):
    info = packed.shards[0]
    path = Path(packed.location, info.name)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        label = next(entry.offset_data for entry in tar.getmembers() if entry.name.endswith(".cls"))
    assert content[label : label + 1].isdigit()
    changed = content[:label] + (b"2" if content[label : label + 1] != b"2" else b"1") + content[label + 1 :]
    path.write_bytes(changed)
    with pytest.raises(ShardError, match="is not the tar that was indexed"):
        list(read_shard(packed.location, info))


def test_a_missing_tar_is_an_error(packed):
    info = packed.shards[1]
    Path(packed.location, info.name).unlink()
    with pytest.raises(ShardError, match=r"cannot read .*shard-000001.tar: there is no such file"):
        list(read_shard(packed.location, info))


@pytest.fixture
def mixed(tmp_path, png, tar):
    """One tar with a good sample between bad ones."""
    pixels = png(np.full((3, 3), 9, np.uint8))
    tar(
        tmp_path / "mixed" / "m.tar",
        [
            ("garbage.png", b"not an image"),
            ("cut.png", pixels[:-30]),
            ("empty.png", b""),
            ("word.png", pixels),
            ("word.cls", b"cat"),
            ("minus.png", pixels),
            ("minus.cls", b"-1"),
            ("good.png", pixels),
            ("good.cls", b" 7\n"),
            ("text.txt", b"no image here"),
            ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n"),
            ("pickle.pyd", b"cos\nsystem\n(S'echo owned'\ntR."),
            ("pickle.png", pixels),
        ],
    )
    return tmp_path / "mixed"


@pytest.mark.parametrize("threads", [1, 4])
def test_bad_samples_are_items_with_an_error_and_the_others_go_on(mixed, threads):
    index = load_index(mixed)
    items = {item.key: item for item in read_shard(mixed, index.shards[0], threads=threads)}
    assert list(items) == index.samples()["key"].to_pylist()
    good = {key for key, item in items.items() if item.error is None}
    assert good == {"good", "pickle"}
    assert items["good"].label == 7
    for key in ("garbage", "cut", "empty", "script"):
        assert "cannot be decoded" in items[key].error
        assert items[key].image is None
    assert items["word"].error == "the label 'cat' in .cls is not an integer from 0"
    assert "'-1'" in items["minus"].error
    assert items["text"].error == "there is no image: expected one of jpg, jpeg, png, webp, found .txt"
    assert index.samples()["label"].to_pylist() == [items[key].label for key in items]


@pytest.mark.parametrize(
    ("content", "label", "problem"),
    [
        (b'{"class": 3}', 3, None),
        (b'{"class": null}', None, None),
        (b"{}", None, None),
        (b'{"class": "3"}', None, "'3' in field 'class'"),
        (b'{"class": true}', None, "'True'"),
        (b'{"class": 1.5}', None, "'1.5'"),
        (b'{"class": -2}', None, "'-2'"),
        (b'{"class": 99999999999}', None, "'99999999999'"),
        (b"[1]", None, "not an object"),
        (b"{", None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
    ],
)
def test_labels_from_json_are_integers_or_errors(tmp_path, png, tar, content, label, problem):
    pixels = png(np.zeros((2, 2), np.uint8))
    tar(tmp_path / "x.tar", [("a.png", pixels), ("a.json", content), ("b.png", pixels), ("b.json", b'{"class": 0}')])
    index = load_index(tmp_path, label_field="json:class")
    first, second = read_shard(tmp_path, index.shards[0], label_field="json:class")
    assert (first.label, second.label) == (label, 0)
    assert (first.error is None) if problem is None else (problem in first.error)


@pytest.mark.parametrize("content", [b"", b"1 2", b"1.0", "٣".encode(), b"9" * 5000, b"2147483648"])
def test_labels_that_are_no_small_integer_are_errors(tmp_path, png, tar, content):
    tar(tmp_path / "x.tar", [("a.png", png(np.zeros((2, 2), np.uint8))), ("a.cls", content)])
    index = load_index(tmp_path)
    (item,) = read_shard(tmp_path, index.shards[0])
    assert item.label is None
    assert "is not an integer from 0" in item.error


def test_only_the_named_image_field_is_decoded(tmp_path, png, tar):
    small, large = png(np.zeros((2, 2), np.uint8)), png(np.zeros((5, 5), np.uint8))
    tar(tmp_path / "x.tar", [("a.seg.png", b"not decoded"), ("a.png", small), ("a.PPM", b"junk"), ("a.thumb", large)])
    info = load_index(tmp_path).shards[0]
    assert next(read_shard(tmp_path, info)).image.size == (2, 2)
    assert next(read_shard(tmp_path, info, image_fields=("THUMB",))).image.size == (5, 5)
    assert "cannot be decoded" in next(read_shard(tmp_path, info, image_fields=("seg.png",))).error


def test_decoding_runs_ahead_by_a_bounded_number_of_images(packed, monkeypatch):
    started = []
    original = Image.open

    def counting(*arguments, **options):
        started.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(Image, "open", counting)
    items = read_shard(packed.location, packed.shards[0], threads=2)
    next(items)
    assert len(started) <= 4
    items.close()


def test_a_reader_left_early_ends_its_threads_and_closes_the_tar(packed):
    before = set(threading.enumerate())
    items = read_shard(packed.location, packed.shards[0], threads=3)
    next(items)
    items.close()
    gc.collect()
    assert set(threading.enumerate()) <= before
