"""Data with every problem at once: each is counted and named in the ledger, and what is left has the rows it should."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import extraction_without_ray
import pytest
from PIL import Image

from codec_dist.config import Config
from codec_dist.extraction import ExtractionError, extract
from codec_dist.shards import ShardError
from codec_dist.store import ContributionStore, Ledger, verify_store

MakeConfig = Callable[..., Config]

KEYS = ("v1.0/cat.d/photo 1", "深い/写真", "naïve%20/ключ", "plain")
FAULTS = {
    "torn": "the image cannot be decoded",
    "text": "the image cannot be decoded: it is not, or not whole, in any of",
    "bare": "there is no image",
    "both": "there are 2 images, .jpg and .png",
    "again": "the key 'again' occurs several times",
    "again.duplicate-2": "the key 'again' occurs several times",
    "beyond": "the label 10 is out of range: there are classes 0 to 9",
    "word": "label",
    "dots 1.1.png": "a key ends at the first",
    "dots 1.2.jpg": "a key ends at the first",
    "bomb": "the image claims 10,000 × 10,000 pixels",
}


def _picture(form: str, shade: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), 20 * shade).save(content, form)
    return content.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three tars: of good samples with odd keys and one without a label, of no sample, and of problems."""
    folder = tmp_path / "shards"
    folder.mkdir()
    good = [
        (f"{key}.{kind}", content)
        for number, key in enumerate(KEYS)
        for kind, content in (("png", _picture("PNG", number)), ("cls", str(number).encode()))
    ]
    _tar(folder / "a.tar", [*good, ("unlabelled.png", _picture("PNG"))])
    _tar(folder / "b.tar", [])
    png, jpeg = _picture("PNG"), _picture("JPEG")
    bomb = b"P5 10000 10000 255 " + bytes(10)
    _tar(
        folder / "c.tar",
        [
            ("again.png", png), ("torn.jpg", jpeg[: len(jpeg) // 2]), ("text.png", b"no image"), ("bare.cls", b"1"),
            ("both.jpg", jpeg), ("both.png", png), ("again.png", png), ("beyond.png", png), ("beyond.cls", b"10"),
            ("word.png", png), ("word.cls", b"cat"), ("dots 1.1.png", png), ("dots 1.2.jpg", jpeg),
            ("bomb.png", bomb), ("in/._fine.png", b"macOS"), ("fine.png", png), ("fine.cls", b"9"),
        ],
    )  # fmt: skip
    return folder


def test_every_problem_is_counted_and_named(make_config: MakeConfig, shards: Path) -> None:
    config = make_config(data={"shards": str(shards), "max_bad_fraction": 0.7})
    extraction_without_ray.extract_here(config)
    location = config.store_location
    # All is done already, so that this only counts.
    summary = extract(config)
    assert (summary.samples, summary.dropped, summary.shards_skipped) == (6, len(FAULTS), 3)
    markers = Ledger(location).done()
    assert [(marker.rows, len(marker.dropped)) for marker in markers.values()] == [(5, 0), (0, 0), (1, len(FAULTS))]
    dropped = dict(markers[2].dropped)
    assert dropped.keys() == FAULTS.keys()
    assert {key: reason for key, reason in dropped.items() if FAULTS[key] not in reason} == {}
    store = ContributionStore(location)
    assert store.samples["key"].to_pylist() == [*KEYS, "unlabelled", "fine"]
    assert store.samples["label"].to_pylist() == [0, 1, 2, 3, None, 9]
    assert verify_store(location).ok
    with pytest.raises(ExtractionError, match=r"11 of 17 samples cannot be used, more than data.max_bad_fraction"):
        extract(make_config(data={"shards": str(shards), "max_bad_fraction": 0.5}))


def test_a_pattern_extracts_the_tars_that_it_names_alone(make_config: MakeConfig, shards: Path) -> None:
    config = make_config(data={"shards": f"{shards}/[ab].tar"})
    extraction_without_ray.extract_here(config)
    store = ContributionStore(config.store_location)
    assert store.samples["key"].to_pylist() == [*KEYS, "unlabelled"]
    assert not (shards / "index.parquet").exists()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (0, "is empty"),
        (1024, "is cut between two members"),
        (1100, "is cut in a header"),
        (512 + 20, "is cut in the data of"),
    ],
)
def test_a_tar_that_is_cut_ends_the_run_before_it_begins(
    make_config: MakeConfig, shards: Path, cut: int, message: str
) -> None:
    (shards / "c.tar").write_bytes((shards / "c.tar").read_bytes()[:cut])
    with pytest.raises(ShardError, match=rf"1 of 3 tars in .*c\.tar is damaged: it {message}"):
        extract(make_config(data={"shards": str(shards)}))
