"""From images to shards: shuffled by a seed, byte for byte the same on every packing."""

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from codec_dist.shards.classes import write_classes
from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardIndex, fingerprint_of, load_index, write_index
from codec_dist.shards.labels import LARGEST_LABEL
from codec_dist.shards.location import Location
from codec_dist.shards.scanning import SAMPLES_SCHEMA, ShardInfo
from codec_dist.utils import Progress


@dataclass(frozen=True)
class Sample:
    """An encoded image and its label on the way into a shard."""

    key: str
    """Unique in the data set; without dots, which end a key in WebDataset."""
    image: bytes
    extension: str
    """Format of the image: jpg, png, webp, ..."""
    label: int | None


def pack(
    source: Iterable[Sample],
    destination: str | Path,
    *,
    name: str = "shard",
    samples_per_shard: int = 1000,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> ShardIndex:
    """Write samples into tars ``NAME-000000.tar``, … with index and class names.

    The order is by a hash of (seed, key): it depends on neither the order of ``source`` nor the machine,
    and tars carry no time or owner, so packing again gives the same bytes and the same fingerprint.
    Everything is written beside ``destination`` and moved there at the end, so the folder is whole or absent.
    Memory: one table row per sample; images pass through a file.

    Raises:
        ShardError: no samples, a key that is unusable or occurs twice, a label out of range, or a
            destination that holds anything but exactly this packing.
    """
    destination = Path(destination).expanduser().absolute()
    if not re.fullmatch(r"[\w-]+", name):
        raise ShardError(f"the shards' name {name!r} is not made of letters, digits, - and _")
    if samples_per_shard < 1:
        raise ShardError(f"{samples_per_shard} samples per shard were asked: at least 1 is needed")
    work = destination.parent / f".{destination.name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a packing that was killed
    work.mkdir(parents=True)
    try:
        with (work / "spool").open("w+b") as file:
            spool = _Spool(file, classes)
            spool.fill(source)
            index = _write_shards(spool, work, name, samples_per_shard, seed)
        (work / "spool").unlink()
        if classes:
            write_classes(Location(work), classes)
        index = ShardIndex(
            str(destination), index.shards, index.fingerprint, tuple(classes) if classes else None,
            kept_fingerprint=index.fingerprint, table=index.table,
        )  # fmt: skip
        write_index(index, Location(work))
        _move(work, destination, index)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_index(destination)


class _Spool:
    """Samples of a source, images in a file, in the order in which they came."""

    def __init__(self, file: BinaryIO, classes: Sequence[str] | None) -> None:
        self._file, self._classes = file, classes
        self._places: dict[str, tuple[int, int, str, int | None]] = {}

    def fill(self, source: Iterable[Sample]) -> None:
        offset = 0
        for sample in source:
            self._check(sample)
            self._file.write(sample.image)
            self._places[sample.key] = (offset, len(sample.image), sample.extension.lower(), sample.label)
            offset += len(sample.image)
        if not self._places:
            raise ShardError("there are no images to pack")

    def keys(self) -> list[str]:
        return list(self._places)

    def get(self, key: str) -> Sample:
        offset, length, extension, label = self._places[key]
        self._file.seek(offset)
        return Sample(key, self._file.read(length), extension, label)

    def _check(self, sample: Sample) -> None:
        key, label = sample.key, sample.label
        if key in self._places:
            raise ShardError(f"the key {key!r} occurs twice: give every image its own name")
        names = key.split("/")
        if not key.isprintable() or "." in key or "\\" in key or "" in names or names[0].startswith("__"):
            raise ShardError(f"the key {key!r} cannot be used: expected printable text without dots, e.g. cat/photo-1")
        if not re.fullmatch(r"[A-Za-z0-9]+", sample.extension) or sample.extension.lower() in ("cls", "json"):
            raise ShardError(
                f"the extension {sample.extension!r} of {key!r} is not that of an image: expected png, jpg, ..."
            )
        if label is not None and not 0 <= label < (len(self._classes) if self._classes else LARGEST_LABEL + 1):
            known = f"0 to {len(self._classes) - 1} (classes)" if self._classes else "integers from 0"
            raise ShardError(f"the label {label} of {key!r} is out of range: expected {known}")


def _write_shards(spool: _Spool, folder: Path, name: str, samples_per_shard: int, seed: int) -> ShardIndex:
    keys = sorted(spool.keys(), key=lambda key: (hashlib.sha256(f"{seed}\x1f{key}".encode()).digest(), key))
    shards, rows = [], []
    with Progress("pack", total=len(keys), unit="images") as progress:
        for number, start in enumerate(range(0, len(keys), samples_per_shard)):
            shard = f"{name}-{number:06d}.tar"
            samples = [spool.get(key) for key in keys[start : start + samples_per_shard]]
            shards.append(write_shard(folder / shard, samples))
            rows += [(shard, position, sample.key, sample.label) for position, sample in enumerate(samples)]
            progress.advance(len(samples), note=shard)
    table = pa.Table.from_arrays(
        [pa.array(column, kind.type) for column, kind in zip(zip(*rows), SAMPLES_SCHEMA)], schema=SAMPLES_SCHEMA
    )
    return ShardIndex(str(folder), tuple(shards), fingerprint_of(shards, "cls"), None, table=table)


def write_shard(path: Path, samples: Sequence[Sample]) -> ShardInfo:
    """Write one tar without time or owner, flushed to disk; the bytes depend on the samples alone."""
    with path.open("wb") as file:
        sink = _HashingSink(file)
        with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
            for member, content in _members(samples):
                entry = tarfile.TarInfo(member)
                entry.size, entry.mode = len(content), 0o644
                tar.addfile(entry, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(path.name, len(samples), sink.bytes, sink.hash.hexdigest())


def _members(samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        yield f"{sample.key}.{sample.extension}", sample.image
        if sample.label is not None:
            yield f"{sample.key}.cls", str(sample.label).encode()


class _HashingSink:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.bytes = 0

    def write(self, piece: bytes) -> int:
        self.hash.update(piece)
        self.bytes += len(piece)
        return self._file.write(piece)


def _move(work: Path, destination: Path, index: ShardIndex) -> None:
    if destination.is_dir() and any(destination.iterdir()):
        _check_same(destination, index)
    else:
        os.replace(work, destination)


def _check_same(destination: Path, index: ShardIndex) -> None:
    refusal = f"{destination} is not empty and does not hold exactly this packing: choose another folder or empty it"
    if not (destination / "index.parquet").exists():
        raise ShardError(refusal)
    existing = load_index(destination)
    if existing.fingerprint != index.fingerprint or existing.classes != index.classes:
        raise ShardError(refusal)
