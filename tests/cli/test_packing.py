"""`shards pack` takes every kind of source, and `shards index` tells what cannot be used."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
    ],
)
def test_options_of_another_source_are_refused(
    source: str, option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "pack", source, str(tmp_path / "s"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_index_tells_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, keys in (("a.tar", []), ("b.tar", ["x", "y", "x"])):
        with tarfile.open(tmp_path / name, "w") as tar:
            for key in keys:
                entry = tarfile.TarInfo(f"{key}.png")
                entry.size = 5
                tar.addfile(entry, io.BytesIO(b"image"))
    assert main(["shards", "index", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"{tmp_path}: 3 samples in 2 shards", "1 of the shards without samples, first a.tar"]
    assert told[2].startswith(
        "2 samples cannot be used by their keys and labels alone, first number 0 in b.tar: the key"
    )
