"""`shards pack` takes every kind of source, and `shards index` tells what cannot be used."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from codec_dist.cli import main
from codec_dist.shards import digits, load_index, read_parts, shape_parts


def test_shapes_are_packed_with_their_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "pack", "shapes", str(tmp_path / "s"), "--count", "50", "--size", "8", "--classes", "4"]
    assert main([*words, "--samples-per-shard", "20", "--seed", "3", "--format", "jpg"]) == 0
    assert f"{tmp_path / 's'}: 50 samples in 3 shards" in capsys.readouterr().out
    index = load_index(tmp_path / "s")
    assert read_parts(tmp_path / "s") == shape_parts(4)
    assert index.classes == tuple(shape_parts(4).class_names())
    with tarfile.open(tmp_path / "s" / "shard-000000.tar") as tar:
        assert tar.getnames()[0].endswith(".jpg")


def test_parquet_files_are_packed(tmp_path: Path) -> None:
    samples = list(digits()[0])[:30]
    table = pa.table(
        {
            "image": [sample.image for sample in samples],
            "mask": [b""] * 30,
            "digit": [f"digit {sample.label}" for sample in samples],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    words = ["shards", "pack", str(tmp_path / "*.parquet"), str(tmp_path / "s")]
    assert main([*words, "--image-column", "image", "--label-column", "digit"]) == 0
    index = load_index(tmp_path / "s")
    assert index.sample_count == 30
    assert index.classes == tuple(f"digit {number}" for number in range(10))


@pytest.mark.parametrize(
    ("source", "option", "message"),
    [
        ("digits", ["--size", "8"], "--size is an option for shapes, but digits is digits"),
        ("shapes", ["--image-column", "x"], "--image-column is an option for Parquet files, but shapes is shapes"),
        ("x.parquet", ["--format", "png"], "--format is an option for shapes, but x.parquet is Parquet files"),
        ("shapes", ["--classes", "1000000"], "1,000,000 classes of shapes"),
        ("shapes", ["--classes", "imagenet"], "--classes 'imagenet': shapes take a whole number"),
        ("digits", ["--classes", "imagenet"], "--classes is an option for shapes, folders and Parquet files"),
    ],
)
def test_options_of_another_source_are_refused(
    source: str, option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "pack", source, str(tmp_path / "s"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_index_tells_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, members in (("a.tar", []), ("b.tar", ["x.png", "y.png", "y.jpg", "x.png", "z.txt"])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                entry = tarfile.TarInfo(member)
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"image"))
    assert main(["shards", "index", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"{tmp_path}: 4 samples in 2 shards", "1 of the shards without samples, first a.tar"]
    assert told[2].startswith(
        "4 samples cannot be used by their keys and labels alone, first number 0 in b.tar: the key"
    )
    assert [line.split(" samples ")[0].strip() for line in told[3:6]] == ["2", "1", "1"]
    assert any("several images" in line and "first y in b.tar" in line for line in told[3:6])
    assert any("no image" in line and "first z in b.tar" in line for line in told[3:6])


def _picture(path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path, **options)


def test_packing_a_folder_ends_with_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("n01440764/1.png", "n01440764/2.bmp", "n02979186/1.gif", "n02979186/v2.0\u00a0a\\b.jpg"):
        _picture(tmp_path / "in" / name)
    for name in ("n01440764/notes.txt", "n01440764/more.txt", "n02979186/._1.png", "n02979186/torn.tif"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    assert main(["shards", "pack", str(tmp_path / "in"), str(tmp_path / "s"), "--classes", "imagenet"]) == 0
    told = capsys.readouterr().out
    assert "4 samples in 1 shard\n" in told
    assert "labelled: 4 samples, 2 classes of 1,000 in classes.json, labels 0 to 482\n" in told
    assert "left out: 4\n" in told
    assert "  2 files .txt, no format of images, first n01440764/more.txt\n" in told
    assert "2 the same pixels as PNG, first" in told
    index = load_index(tmp_path / "s")
    assert {row["key"].partition("/")[0]: row["label"] for row in index.samples().to_pylist()} == {
        "n01440764": 0, "n02979186": 482
    }  # fmt: skip
    assert index.classes is not None
    assert index.classes[482] == "cassette player"


def test_folders_that_are_some_of_imagenets_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _picture(tmp_path / "in" / "n02979186" / "1.png")
    assert main(["shards", "pack", str(tmp_path / "in"), str(tmp_path / "s")]) == 0
    assert "--classes imagenet" in capsys.readouterr().out
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    assert main(["shards", "pack", str(tmp_path / "in"), str(tmp_path / "t")]) == 2
    assert "gone -> nowhere" in capsys.readouterr().err


def test_a_pattern_is_indexed_and_what_is_passed_over_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train-0.tar", "val-0.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in ("a.png", "a.cls", "x/._a.png", "Shot 2.1.png", "Shot 2.2.png", "b.cls"):
                content = b"3" if member.endswith(".cls") else b"image"
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert main(["shards", "index", f"{tmp_path}/train-*.tar"]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/train-*.tar: 4 samples in 1 shard\n" in told
    assert "3 samples cannot be used by their keys and labels alone\n" in told
    assert "labelled: 2 samples, 1 classes, labels 3 to 3\n" in told
    assert "left out (members of no sample): 1\n" in told
    assert not (tmp_path / "index.parquet").exists()
