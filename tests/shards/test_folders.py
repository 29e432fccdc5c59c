"""Image folders: every image in every format under any name is packed, and what is not is counted by reason."""

import os
import tarfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from codec_dist.shards import ShardError, image_folder, pack, read_shard

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RANDOM = np.random.default_rng(3)
COLOURS = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), np.uint8))
DEEP = Image.fromarray(RANDOM.integers(0, 2**16, (5, 7)).astype(np.uint16))


def picture(folder, name, image=COLOURS, **options):
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def members(folder):
    """Name and content of all images, as Python's tarfile reads them."""
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return {name: content for name, content in found.items() if not name.endswith(".cls")}


def packed(source, destination):
    samples, classes = image_folder(source)
    return samples, pack(samples, destination, classes=classes)


# Any bytes that a file name can have, with those that made trouble more often.
ODD = st.sampled_from(
    [b".", b"%", b"\\", b"\n", b"\t", b" ", b"__", "\u00a0".encode(), b"\xff", b"%2E", "\u2028".encode(), b"a"]
)
STEMS = st.lists(ODD | st.binary(min_size=1, max_size=4), min_size=1, max_size=8).map(b"".join)
NAMES = st.tuples(STEMS, st.sampled_from([b".png", b".jpg", b".JPEG", b".jpg.png", b".webp"])).map(b"".join)
USABLE = NAMES.filter(lambda name: not {b"/"[0], 0} & set(name) and not name.startswith(b"."))


@MANY
@given(names=st.sets(USABLE, min_size=1, max_size=12), folder=USABLE)
def test_any_set_of_file_names_is_as_many_samples_and_reads_back(tmp_path_factory, names, folder):
    root = tmp_path_factory.mktemp("names")
    source = os.fsencode(root / "in") + b"/" + folder
    os.makedirs(source)
    for number, name in enumerate(sorted(names)):
        Path(os.fsdecode(source + b"/" + name)).write_bytes(b"image %d" % number)
    samples, index = packed(root / "in", root / "out")
    assert (index.sample_count, samples.left_out.total) == (len(names), 0)

    keys = [item.key for info in index.shards for item in read_shard(root / "out", info)]
    assert len(set(keys)) == len(names)
    name_of = {b"image %d" % number: name for number, name in enumerate(sorted(names))}
    found = set()
    for member, content in members(root / "out").items():
        key, _, extension = member.rpartition(".")
        name = name_of[content]
        assert key in keys
        assert extension == name.rpartition(b".")[2].decode().lower()
        # The key keeps the suffix only where another file would have the same key without.
        assert unquote_to_bytes(key).removeprefix(folder + b"/") in (name, os.path.splitext(name)[0])
        found.add(name)
    assert found == names


def test_files_that_differ_in_their_suffix_alone_are_distinct_samples(tmp_path):
    for name in ("1.png", "1.jpg", "1.jpg.png", "2.png"):
        picture(tmp_path / "in" / "a", name)
    samples, _ = packed(tmp_path / "in", tmp_path / "out")
    assert sorted(samples.keys()) == ["a/1%2Ejpg", "a/1%2Ejpg%2Epng", "a/1%2Epng", "a/2"]


SAVED = {
    "a.bmp": (COLOURS, {}), "a.tif": (COLOURS, {}), "a.tiff": (DEEP, {}), "a.ppm": (COLOURS, {}),
    "a.pgm": (COLOURS.convert("L"), {}), "deep.pgm": (DEEP, {}), "a.pbm": (COLOURS.convert("1"), {}),
    "a.GIF": (COLOURS, {}),
    "cmyk.tif": (COLOURS.convert("CMYK"), {}), "alpha.tif": (COLOURS.convert("RGBA"), {}),
    "grey-alpha.tif": (COLOURS.convert("LA"), {}), "palette.bmp": (COLOURS.quantize(9), {}),
    "palette.tif": (COLOURS.quantize(200), {}), "transparent.gif": (COLOURS.quantize(9), {"transparency": 3}),
    "animated.gif": (COLOURS, {"save_all": True, "append_images": [COLOURS.rotate(180)]}),
    "pages.tif": (COLOURS, {"save_all": True, "append_images": [COLOURS.rotate(180)]}),
    "whole.tif": (Image.fromarray(np.arange(35, dtype=np.float32).reshape(5, 7)), {}),
    "integer.tif": (Image.fromarray(np.arange(35, dtype=np.int32).reshape(5, 7)), {}),
    "a.tga": (COLOURS, {}), "a.jp2": (COLOURS, {"irreversible": False}), "a.ico": (COLOURS, {}), "a.pcx": (COLOURS, {}),
    "rotated.tif": (COLOURS, {"exif": Image.Exif()}),
}  # fmt: skip
SAVED["rotated.tif"][1]["exif"][0x112] = 6


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    for name, (image, options) in SAVED.items():
        picture(folder / "in" / name.replace(".", "-"), name, image, **options)
    samples, index = packed(folder / "in", folder / "out")
    return folder / "in", samples, index


def test_images_of_other_formats_are_stored_as_png_of_the_pixels_that_pillow_decodes(formats):
    folder, samples, index = formats
    items = {item.key: item for info in index.shards for item in read_shard(index.location, info)}
    assert len(items) == len(SAVED)
    assert all(name.endswith(".png") for name in members(index.location))
    for name in SAVED:
        group = name.replace(".", "-")
        with Image.open(folder / group / name) as original:  # as torchvision's loader
            expected = np.asarray(original.convert("RGB"))
        item = items[f"{group}/{os.path.splitext(name)[0]}"]
        assert item.error is None
        np.testing.assert_array_equal(np.asarray(item.image.convert("RGB")), expected, err_msg=name)
    assert (samples.left_out.total, samples.changed.total) == (0, len(SAVED))
    assert sorted(samples.changed.counts.values()) == [2, len(SAVED) - 2], "of two files the first picture"


def test_sixteen_bits_of_grey_are_kept(formats):
    _, _, index = formats
    items = {item.key: item for info in index.shards for item in read_shard(index.location, info)}
    for key in ("a-tiff/a", "deep-pgm/deep"):
        np.testing.assert_array_equal(np.asarray(items[key].image), np.asarray(DEEP))


def test_jpegs_pngs_and_webps_are_packed_byte_by_byte_whatever_their_suffix(tmp_path):
    for name, form in (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.jpeg", "JPEG"), ("d.bmp", "PNG"), ("e.webp", "WEBP")):
        picture(tmp_path / "in" / "x", name, format=form)
    packed(tmp_path / "in", tmp_path / "out")
    files = {path.stem: path.read_bytes() for path in (tmp_path / "in" / "x").iterdir()}
    expected = {f"x/{stem}.{kind}": files[stem] for stem, kind in zip("abcde", ("jpg", "jpg", "jpeg", "png", "webp"))}
    assert members(tmp_path / "out") == expected


def test_what_torchvision_takes_is_packed_with_its_labels(tmp_path):
    folder = pytest.importorskip("torchvision").datasets.folder
    for number, suffix in enumerate(folder.IMG_EXTENSIONS):
        for group in ("b", "a", "C"):
            picture(tmp_path / "in" / group, f"{number}{suffix}", COLOURS.convert("L"))
    theirs = folder.ImageFolder(tmp_path / "in")
    samples, classes = image_folder(tmp_path / "in")
    assert classes == theirs.classes
    ours = {each.key: each.label for each in samples}
    assert ours == {os.path.relpath(path, tmp_path / "in").rpartition(".")[0]: label for path, label in theirs.samples}


def test_what_png_cannot_hold_and_what_is_no_image_is_left_out_by_reason(tmp_path):
    picture(tmp_path / "in" / "x", "float.tif", Image.fromarray(np.full((2, 2), 0.5, np.float32)))
    picture(tmp_path / "in" / "x", "lab.tif", Image.frombytes("LAB", (1, 1), b"abc"))
    picture(tmp_path / "in" / "x", "good.png")
    for name in (
        "torn.bmp",
        "notes.txt",
        "more.txt",
        "drawing.svg",
        "README",
        ".DS_Store",
        "._good.png",
        "page.pdf",
        "x.eps",
    ):
        Path(tmp_path, "in", "x", name).write_bytes(b"%PDF")
    os.mkfifo(tmp_path / "in" / "x" / "pipe.png")
    samples, index = packed(tmp_path / "in", tmp_path / "out")
    assert index.sample_count == 1
    assert samples.left_out.total == 12
    assert sorted(samples.left_out.counts.values()) == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert samples.left_out.counts["files .txt, no format of images"] == 2


def test_a_folder_of_files_that_are_no_images_is_refused(tmp_path):
    Path(tmp_path, "in", "x").mkdir(parents=True)
    Path(tmp_path, "in", "x", "a.bmp").write_bytes(b"torn")
    with pytest.raises(ShardError, match="none of 1 files"):
        packed(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_to_nowhere_are_named(tmp_path):
    picture(tmp_path / "a", "1.png")
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    (tmp_path / "a" / "3.png").symlink_to("3.png")
    (tmp_path / "b").symlink_to("b")
    with pytest.raises(ShardError, match=r"3 links in .* lead nowhere, first a/2.png -> gone.png"):
        image_folder(tmp_path)


def test_a_folder_that_links_reach_again_is_packed_once_where_it_lies(tmp_path):
    root = tmp_path / "in"
    for name in ("ant/1.png", "ant/deep/2.png", "zebra/3.png"):
        picture(root, name)
    picture(tmp_path, "elsewhere/4.png")
    (root / "bee").symlink_to("zebra")  # before what it means, by name
    (root / "ant" / "loop").symlink_to("..")
    (root / "ant" / "again").symlink_to("deep")
    (root / "ant" / "far").symlink_to(tmp_path / "elsewhere")
    (root / "zebra" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "home").symlink_to(root)
    samples, classes = image_folder(root)
    assert classes == ["ant", "zebra"]
    assert {each.key: each.label for each in samples} == {"ant/1": 0, "ant/deep/2": 0, "ant/far/4": 0, "zebra/3": 1}
    assert samples.left_out.counts == {"links to folders that are packed already": 5}


def test_links_to_images_are_images(tmp_path):
    picture(tmp_path, "store/blob.png")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "1.png").symlink_to(tmp_path / "store" / "blob.png")
    samples, _ = image_folder(tmp_path / "in")
    assert [(each.key, each.image) for each in samples] == [("a/1", (tmp_path / "store" / "blob.png").read_bytes())]


PARTS = st.sampled_from(["a", "b.d", ".git", "__MACOSX", "c c"])
FILES = st.tuples(
    st.sampled_from(["x", "y", "._x", ".z", "é", "__w__"]),
    st.sampled_from([".png", ".PNG", ".jpg", ".txt", "", ".bmp"]),
).map("".join)


@MANY
@given(
    files=st.sets(st.tuples(st.sampled_from(["k", "l"]), st.lists(PARTS, max_size=2).map(tuple), FILES), max_size=14),
    links=st.dictionaries(
        st.sampled_from(["k/link", "l/link", "k/a/link", "m", "k/link.png"]),
        st.sampled_from(["k", "l", "k/a", ".", "../far", "../far/in", "k/x.png"]),
        max_size=4,
    ),
)
def test_packed_and_left_out_are_all_that_there_is(tmp_path_factory, files, links):
    top = tmp_path_factory.mktemp("tree")
    root, far = top / "in", top / "far"
    for folder in ("k", "l"):
        picture(root / folder, "keep.jpg")
    for folder in (far, far / "in"):
        picture(folder, "out.png")
    for folder, parts, name in files:
        Path(root, folder, *parts).mkdir(parents=True, exist_ok=True)
        with open(Path(root, folder, *parts, name), "wb") as file:
            COLOURS.save(file, "BMP" if name.endswith(".bmp") else "PNG")
    for name, target in links.items():
        if (root / name).parent.is_dir() and (root / target).exists():
            (root / name).symlink_to(os.path.relpath(root / target, (root / name).parent))

    samples, index = packed(root, top / "out")
    reached = reachable(root)
    entries = [entry for folder in reached for entry in os.scandir(folder)]
    seen = [entry for entry in entries if entry.is_symlink() or not entry.is_dir()]
    hidden = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and is_hidden(entry.name)]
    below_hidden = [name for each in hidden for _, _, names in os.walk(each.path) for name in names]
    followed = [folder for folder in reached if folder != str(root) and os.path.dirname(folder) not in reached]
    assert index.sample_count + samples.left_out.total == len(seen) + len(below_hidden) - len(followed)
    assert len(members(top / "out")) == index.sample_count


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def reachable(root):
    """All folders below, by the places where they lie."""
    found, todo = set(), [str(root)]
    while todo:
        folder = os.path.realpath(todo.pop())
        if folder not in found:
            found.add(folder)
            todo += [each.path for each in os.scandir(folder) if each.is_dir() and not is_hidden(each.name)]
    return found
