"""Small folders of shards for the tests of this package."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec_dist.shards import Sample, ShardIndex, pack


def encode_png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def make_samples(count: int, classes: int = 3, prefix: str = "image") -> list[Sample]:
    random = np.random.default_rng(7)
    images = random.integers(0, 256, (count, 4, 5), dtype=np.uint8)
    return [
        Sample(f"{prefix}-{number:04d}", encode_png(image), "png", number % classes)
        for number, image in enumerate(images)
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar as others might make it, with times and owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (name, content) in enumerate(members):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uname = len(content), 1_700_000_000 + number, "someone"
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def packed(tmp_path: Path) -> ShardIndex:
    """25 labelled samples of 3 classes in shards of 10."""
    return pack(make_samples(25), tmp_path / "shards", samples_per_shard=10, classes=["a", "b", "c"])


@pytest.fixture
def png() -> Callable[[np.ndarray], bytes]:
    return encode_png


@pytest.fixture
def samples_of() -> Callable[..., list[Sample]]:
    return make_samples


@pytest.fixture
def tar() -> Callable[[Path, Iterable[tuple[str, bytes]]], None]:
    return write_tar
