"""Data with problems: every sample that cannot be used is counted and named, and no tar that is torn passes."""

from pathlib import Path

import numpy as np
import pytest

from codec_dist.shards import ShardError, build_index, limit_samples, load_index, make_split, read_shard


@pytest.fixture
def pixels(png):
    return png(np.full((3, 3), 9, np.uint8))


def read(index, **options):
    return {item.key: item for info in index.shards for item in read_shard(index.location, info, **options)}


def test_two_samples_of_one_key_are_both_unusable_and_have_names_of_their_own(tmp_path, tar, pixels):
    members = [("a.png", pixels), ("a.cls", b"1"), ("b.png", pixels), ("b.cls", b"2")]
    tar(tmp_path / "x.tar", [*members, ("a.png", pixels), ("a.cls", b"0"), ("c.png", pixels), ("a.cls", b"7")])
    index = load_index(tmp_path)
    assert index.sample_count == 5
    assert index.problem_count == 3
    items = read(index)
    assert list(items) == ["a", "b", "a.duplicate-2", "c", "a.duplicate-3"]
    assert [item.error is None for item in items.values()] == [False, True, False, True, False]
    assert "the key 'a' occurs several times" in items["a"].error
    assert items["a"].error == items["a.duplicate-2"].error == items["a.duplicate-3"].error
    assert (
        [item.label for item in items.values()] == index.samples()["label"].to_pylist() == [None, 2, None, None, None]
    )
    assert load_index(tmp_path) == index, "what was found is kept with the index"
    assert make_split(index.samples(), 0.6, 0.2, 0.2, 0)["key"].to_pylist() == list(items)


def test_a_limit_keeps_the_problems_of_its_samples(tmp_path, tar, pixels):
    tar(tmp_path / "x.tar", [("a.png", pixels), ("b.png", pixels), ("a.cls", b"1"), ("c.png", pixels)])
    limited = limit_samples(load_index(tmp_path), 2)
    assert limited.problem_count == 1
    assert [item.error is None for item in read(limited).values()] == [False, True]


def test_the_same_key_in_two_tars_is_two_samples(tmp_path, tar, pixels):
    for name in ("x.tar", "y.tar"):
        tar(tmp_path / name, [("a.png", pixels), ("a.cls", b"1")])
    index = load_index(tmp_path)
    assert index.problem_count == 0
    assert [item.error for info in index.shards for item in read_shard(tmp_path, info)] == [None, None]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("a.PNG", "there are two members .png: which one counts is not known"),
        ("a.jpg", "there are 2 images, .jpg and .png: name the one that counts in data.image_fields"),
    ],
)
def test_a_sample_with_two_images_is_unusable(tmp_path, tar, pixels, second, message):
    tar(tmp_path / "x.tar", [("a.png", pixels), (second, pixels), ("a.cls", b"1"), ("b.png", pixels)])
    items = read(load_index(tmp_path))
    assert items["a"].error == message
    assert items["a"].image is None
    assert items["b"].error is None


def test_of_two_images_the_named_one_counts(tmp_path, tar, pixels):
    tar(tmp_path / "x.tar", [("a.png", pixels), ("a.jpg", b"no image")])
    assert read(load_index(tmp_path), image_fields=["png"])["a"].error is None


def test_a_sample_without_image_is_unusable_and_one_without_label_is_not(tmp_path, tar, pixels):
    tar(tmp_path / "x.tar", [("a.cls", b"1"), ("a.txt", b""), ("b.png", pixels)])
    items = read(load_index(tmp_path))
    assert items["a"].error == "there is no image: expected one of jpg, jpeg, png, webp, found .cls, .txt"
    assert (items["b"].error, items["b"].label) == (None, None)


def test_an_image_that_is_a_link_is_unusable(tmp_path, pixels):
    import tarfile

    (tmp_path / "a.png").write_bytes(pixels)
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        archive.add(tmp_path / "b.png", "b.png")
    items = read(load_index(tmp_path))
    assert items["a"].error is None
    assert items["b"].error == "the member .png is a link, not a file"


def test_labels_without_a_class_are_unusable(tmp_path, tar, pixels):
    for number in range(2):
        members = [(f"{number}{label}.{kind}", content) for label in range(3)
                   for kind, content in (("png", pixels), ("cls", b"%d" % label))]  # fmt: skip
        tar(tmp_path / "s" / f"{number}.tar", members)
    plain = load_index(tmp_path / "s")
    assert plain.problem_count == 0
    (tmp_path / "s" / "classes.json").write_text('["zero", "one"]')
    with pytest.raises(ShardError, match=r"names 2 classes, and named 0 when the shards were indexed: index again"):
        load_index(tmp_path / "s")
    index = build_index(tmp_path / "s")
    assert index.problem_count == 2
    assert index.fingerprint != plain.fingerprint, "other samples are used"
    items = read(index)
    assert items["02"].error == items["12"].error == "the label 2 is out of range: classes.json names classes 0 to 1"
    assert [item.label for item in items.values()] == index.samples()["label"].to_pylist() == [0, 1, None] * 2
    assert load_index(tmp_path / "s") == index


def test_labels_beyond_the_classes_that_a_reader_has_are_unusable(tmp_path, tar, pixels):
    tar(
        tmp_path / "x.tar", [("a.png", pixels), ("a.cls", b"9"), ("b.png", pixels), ("b.cls", b"10"), ("c.png", pixels)]
    )
    items = read(load_index(tmp_path), classes=10)
    assert [item.error for item in items.values()] == [
        None, "the label 10 is out of range: there are classes 0 to 9", None
    ]  # fmt: skip
    assert items["b"].label is None


def test_keys_may_hold_slashes_dots_in_folders_and_any_script(tmp_path, tar, pixels):
    keys = ["v1.0/cat.d/photo 1", "深い/写真", "naïve%20/ключ", "a" * 150, "./b"]
    members = [(f"{key}.{kind}", content) for key in keys for kind, content in (("png", pixels), ("cls", b"3"))]
    tar(tmp_path / "x.tar", members)
    index = load_index(tmp_path)
    assert index.samples()["key"].to_pylist() == keys
    assert {key: (item.label, item.error) for key, item in read(index).items()} == dict.fromkeys(keys, (3, None))


def test_each_image_whose_key_ends_at_a_shared_dot_is_a_bad_sample_of_its_own(tmp_path, tar, pixels):
    members = [("Screenshot 2.1.png", pixels), ("Screenshot 2.1.cls", b"1"), ("Screenshot 2.2.PNG", pixels)]
    tar(tmp_path / "x.tar", [*members, ("b.png", pixels), ("b.cls", b"0"), ("Screenshot 2.1.png", pixels),
                             ("Screenshot 2.3.jpg", pixels), ("c.png", pixels)])  # fmt: skip
    index = build_index(tmp_path)
    items = read(index)
    bad = [
        "Screenshot 2.1.png",
        "Screenshot 2.2.png",
        "Screenshot 2.1.png.duplicate-2",
        "Screenshot 2.3.jpg.duplicate-2",
    ]
    assert list(items) == index.samples()["key"].to_pylist() == [*bad[:2], "b", *bad[2:], "c"]
    assert [key for key, item in items.items() if item.error is not None] == bad
    assert all("a key ends at the first" in items[key].error for key in bad)
    assert (items["b"].label, index.samples()["label"].null_count) == (0, 5)
    assert index.findings.unusable.total == 4


def test_one_image_with_dots_in_its_name_is_told_why_it_is_none(tmp_path, tar, pixels):
    tar(tmp_path / "x.tar", [("photo.1.png", pixels), ("a.png", pixels)])
    items = read(load_index(tmp_path))
    assert "found .1.png (an extension begins at the first dot" in items["photo"].error


def test_extensions_with_dots_that_are_asked_for_are_images_of_one_sample(tmp_path, tar, pixels, png):
    right = png(np.zeros((7, 7), np.uint8))
    tar(tmp_path / "x.tar", [("a.left.png", pixels), ("a.right.png", right), ("a.cls", b"4")])
    plain = load_index(tmp_path)
    assert plain.sample_count == 2, "an image each"
    fields = ("right.png",)
    index = load_index(tmp_path, tmp_path / "cache", image_fields=fields)
    items = read(index, image_fields=fields)
    assert {key: (item.label, item.image.size) for key, item in items.items()} == {"a": (4, (7, 7))}
    assert load_index(tmp_path, tmp_path / "cache", image_fields=fields) == index
    assert load_index(tmp_path) == plain


def test_files_of_operating_systems_are_passed_over_and_counted(tmp_path, tar, pixels):
    passed = ["._root.png", "dir/._a.png", "dir/.hidden.jpg", "__MACOSX/dir/._a.png", "x/__MACOSX/b.png", ".DS_Store",
              "dir/.DS_Store", "dir/Thumbs.db", "desktop.ini", "README", "__index__"]  # fmt: skip
    members = [(name, b"\0\5\x16\7") for name in passed]
    images = [("./dir/a.png", pixels), ("./dir/a.cls", b"1"), (".config/b.png", pixels), ("dir.d/c.png", pixels)]
    tar(tmp_path / "x.tar", [member for pair in zip(members, images) for member in pair] + members[len(images) :])
    index = build_index(tmp_path)
    assert {key: (item.label, item.error) for key, item in read(index).items()} == {
        "./dir/a": (1, None), ".config/b": (None, None), "dir.d/c": (None, None)
    }  # fmt: skip
    assert index.findings.passed_over.total == len(passed)
    assert index.findings.unusable.total == 0


def test_an_empty_shard_is_a_shard_without_samples(tmp_path, tar, pixels):
    tar(tmp_path / "empty.tar", [])
    tar(tmp_path / "full.tar", [("a.png", pixels)])
    index = load_index(tmp_path)
    assert [(info.name, info.samples) for info in index.shards] == [("empty.tar", 0), ("full.tar", 1)]
    assert list(read_shard(tmp_path, index.shards[0])) == []


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (0, "it is empty (0 bytes)"),
        (1024, "it is cut between two members: the mark of a tar's end is missing, at byte 1,024"),
        (1100, "it is cut in a header, at byte 1,100"),
        (1540, "it is cut in the data of b.png, at byte 1,540"),
    ],
)
def test_a_torn_tar_without_index_is_refused_by_name(tmp_path, tar, pixels, cut, message):
    for name in ("w", "x", "y", "z"):
        tar(tmp_path / f"{name}.tar", [("a.png", pixels), ("b.png", pixels)])
    Path(tmp_path, "x.tar").write_bytes(Path(tmp_path, "x.tar").read_bytes()[:cut])
    with pytest.raises(ShardError) as caught:
        load_index(tmp_path)
    assert str(caught.value) == (
        f"1 of 4 tars in {tmp_path} are damaged: {tmp_path}/x.tar is damaged: {message}; "
        "restore or remove what is damaged"
    )
    assert not (tmp_path / "index.parquet").exists()


def test_all_torn_tars_are_counted(tmp_path, tar, pixels):
    for number in range(6):
        tar(tmp_path / f"{number}.tar", [("a.png", pixels)])
        if number != 2:
            Path(tmp_path, f"{number}.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"5 of 6 tars in .*0.tar is damaged.*1.tar.*3.tar is damaged.*, \.\.\.;"):
        load_index(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"cut", b"\0" * 10240])
def test_a_tar_that_is_torn_after_it_was_indexed_is_refused_when_read(packed, damage):
    info = packed.shards[1]
    Path(packed.location, info.name).write_bytes(damage)
    with pytest.raises(ShardError, match=r"shard-000001.tar is cut short: 0 samples in .* the index says 10"):
        list(read_shard(packed.location, info))
