"""What reading a tar promises: the members that tarfile finds, and an error wherever the tar is cut."""

import bz2
import gzip
import io
import lzma
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_dist.shards.errors import DamagedTarError
from codec_dist.shards.tar import TarReader, stream_samples

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90).filter(
    lambda name: name not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
SHORT = st.from_regex(r"[a-z][a-z0-9_.-]{0,80}(/[a-z0-9_.-]{1,70}x)?", fullmatch=True)


def tar_of(members, form=tarfile.PAX_FORMAT, **options):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form, **options) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.uname, entry.mtime = len(data), "jürgen", 1_700_000_000.5
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def members_of(content, stream=io.BytesIO):
    tar = TarReader(stream(content), "x.tar")
    return [(member.name, tar.content()) for member in tar]


class Sips:
    """A stream that gives a few bytes at a time, as sockets do."""

    def __init__(self, content):
        self._content, self._size = io.BytesIO(content), 0

    def read(self, size=-1):
        self._size = self._size % 97 + 1
        return self._content.read(min(size, self._size))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PATHS, st.binary(max_size=1500)), max_size=6), st.booleans())
def test_members_are_those_that_were_written(members, as_pax):
    content = tar_of(members, tarfile.PAX_FORMAT if as_pax else tarfile.GNU_FORMAT)
    assert members_of(content) == members
    assert members_of(content, Sips) == members


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(SHORT, st.binary(max_size=600)), max_size=5))
def test_ustar_archives_with_prefixes_are_read(members):
    assert members_of(tar_of(members, tarfile.USTAR_FORMAT)) == members


def test_folders_are_left_out_and_links_are_told(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"image")
    (tmp_path / "folder" / "b.png").hardlink_to(tmp_path / "folder" / "a.png")
    (tmp_path / "folder" / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("", "/a.png", "/b.png", "/c.png"):
            tar.add(tmp_path / f"folder{name}", f"folder{name}", recursive=False)
    reader = TarReader(io.BytesIO((tmp_path / "x.tar").read_bytes()), "x.tar")
    assert [tuple(member) for member in reader] == [
        ("folder/a.png", None),
        ("folder/b.png", "a link"),
        ("folder/c.png", "a link"),
    ]


def test_a_tar_cut_at_any_byte_is_an_error_that_yields_only_whole_samples():
    samples = [("a", b"x" * 700, b"1"), ("ü" * 70, b"y" * 512, b"2"), ("c", b"", b"3")]
    members = [member for key, image, label in samples for member in ((f"{key}.png", image), (f"{key}.cls", label))]
    content = tar_of(members)
    expected = [(key, {"png": image, "cls": label}) for key, image, label in samples]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512  # of the last member; then comes the mark of the end
    for cut in range(0, end + 512, 7):
        found = []
        with pytest.raises(DamagedTarError, match=r"x.tar is damaged: it is (cut|empty)"):
            found.extend((each.key, each.members) for each in stream_samples(io.BytesIO(content[:cut]), "x.tar"))
        assert found == expected[: len(found)]
        assert len(found) < 3
    for cut in range(end + 512, len(content) + 1, 512):
        found = [(each.key, each.members) for each in stream_samples(io.BytesIO(content[:cut]), "x.tar")]
        assert found == expected


def test_tars_that_were_joined_are_refused_where_the_first_ends():
    content = tar_of([("a.png", b"1")]) + tar_of([("b.png", b"2")])
    with pytest.raises(DamagedTarError, match=r"goes on after its end at byte 2,560"):
        members_of(content)


@pytest.mark.parametrize("position", [0, 100, 148, 156, 345, 511])
def test_a_changed_header_is_refused(position):
    content = bytearray(tar_of([("a.png", b"1"), ("b.png", b"2")], tarfile.USTAR_FORMAT))
    content[1024 + position] ^= 0x11
    with pytest.raises(DamagedTarError, match=r"header at byte 1,024 is not one of a tar"):
        members_of(bytes(content))


def with_header(content, change):
    """The tar with its first header changed, and that header's checksum set right."""
    header = bytearray(content[:512])
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def test_sizes_in_base_256_are_read():
    def change(header):
        header[124:136] = b"\x80" + (700).to_bytes(11, "big")

    content = tar_of([("a.png", b"x" * 700), ("b.png", b"2")], tarfile.GNU_FORMAT)
    assert members_of(with_header(content, change)) == [("a.png", b"x" * 700), ("b.png", b"2")]


def test_checksums_of_signed_bytes_are_accepted():
    content = bytearray(tar_of([("ü.png", b"1")], tarfile.GNU_FORMAT))
    header = content[:148] + b" " * 8 + content[156:512]
    content[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in header)
    assert members_of(bytes(content)) == [("ü.png", b"1")]


def test_a_name_that_is_not_utf8_keeps_its_bytes_readable():
    content = tar_of([("caf\xe9.png", b"1")], tarfile.GNU_FORMAT, encoding="latin-1")
    assert members_of(content) == [(r"caf\xe9.png", b"1")]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_told_to_be_one(compress):
    with pytest.raises(DamagedTarError, match=r"x.tar is damaged: it is compressed; decompress it"):
        members_of(compress(tar_of([("a.png", os.urandom(2000))])))


def test_a_sparse_file_is_refused_by_name():
    def change(header):
        header[156:157] = b"S"

    with pytest.raises(DamagedTarError, match=r"a.png is a sparse file"):
        members_of(with_header(tar_of([("a.png", b"1")], tarfile.GNU_FORMAT), change))


def test_samples_are_those_of_webdataset(packed):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for info in packed.shards:
        path = f"{packed.location}/{info.name}"
        with open(path, "rb") as ours, open(path, "rb") as theirs:
            found = [(sample.key, sample.members) for sample in stream_samples(ours, path)]
            library = [
                (sample.pop("__key__"), {name: value for name, value in sample.items() if not name.startswith("__")})
                for sample in group_by_keys(tar_file_expander([{"url": path, "stream": theirs}]))
            ]
        assert found == library
