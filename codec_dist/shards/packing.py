"""From images to shards: shuffled by a seed, byte for byte the same on every packing."""

import hashlib
import io
import operator
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Int, UInt64

from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardIndex, fingerprint_of, load_index, write_classes, write_index
from codec_dist.shards.location import Location
from codec_dist.shards.samples import AddressableSource, Sample, check_key, check_sample
from codec_dist.shards.scanning import SAMPLES_SCHEMA, ShardInfo
from codec_dist.utils import Progress

# Samples that are requested of an addressable source together.
READ_AT_ONCE = 256
# Sources with fewer images are read before a bar could be seen.
SHOWN_FROM = 10_000

# Rank, bytes of the key, of the extension and of the image, label (-1: none).
HEADER = struct.Struct("<32sIBQq")
NO_LABEL = -1

BLOCK, RECORD = 512, 10240
WRITTEN_AT_ONCE = 1 << 20


def pack(
    source: Iterable[Sample],
    destination: str | Path,
    *,
    name: str = "shard",
    samples_per_shard: int = 1000,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> ShardIndex:
    """Write samples into tars ``NAME-000000.tar``, … with index and class names.

    The order is by a hash of (seed, key): it depends on neither the order of ``source`` nor the machine,
    and tars carry no time or owner, so packing again gives the same bytes and the same fingerprint.
    Everything is written beside ``destination`` and moved there at the end, so the folder is whole or absent.

    Memory grows by about 150 bytes per sample, for the table of samples and the order (190 MB for ImageNet). Images
    of an :class:`AddressableSource` are read in their final order, 256 at a time. Those of any other source are
    parted by their place in the order into 256 files on the disk of ``destination``, 64 MB at a time, and packed
    file after file: each image is written and read once more, never all are in memory.

    Args:
        source: the samples.
        destination: new or empty folder for the shards.
        name: prefix of the tars' names.
        samples_per_shard: samples in every tar but the last.
        seed: seed of the shuffle.
        classes: class names by label.
        beside: further files (name → content) to write beside the shards.

    Raises:
        ShardError: no samples, a key that is unusable or occurs twice, a label out of range, or a
            destination that holds anything but exactly this packing.
    """
    destination = Path(destination).expanduser().absolute()
    if not re.fullmatch(r"[\w-]+", name):
        raise ShardError(f"the shards' name {name!r} is not made of letters, digits, - and _")
    if samples_per_shard < 1:
        raise ShardError(f"{samples_per_shard} samples per shard were requested: at least 1 is needed")
    work = destination.parent / f".{destination.name}.partial"
    shutil.rmtree(work, ignore_errors=True)  # left by a packing that was killed
    work.mkdir(parents=True)
    try:
        count, samples = _in_order(source, seed, len(classes) if classes else None, work)
        shards, table = _write_shards(samples, count, work, name, samples_per_shard)
        for file, content in (beside or {}).items():
            (work / file).write_bytes(content)
        if classes:
            write_classes(Location(work), classes)
        fingerprint = fingerprint_of(shards, "cls")
        names = tuple(classes) if classes else None
        index = ShardIndex(
            str(destination), tuple(shards), fingerprint, names, kept_fingerprint=fingerprint, table=table
        )
        write_index(index, Location(work))
        _move(work, destination, index)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_index(destination)


def _in_order(source: Iterable[Sample], seed: int, classes: int | None, work: Path) -> tuple[int, Iterator[Sample]]:
    """Number of samples, and the samples in the order of their ranks."""
    if isinstance(source, AddressableSource):
        return len(source), _by_number(source, seed, classes)
    buckets = Buckets(work, seed)
    expected = operator.length_hint(source)
    with Progress("read", total=expected, unit="images") if expected > SHOWN_FROM else nullcontext() as progress:
        for sample in source:
            check_key(sample.key)
            check_sample(sample, classes)
            buckets.add(sample)
            if progress is not None:
                progress.advance()
    return len(buckets), buckets.drain()


def _by_number(source: AddressableSource, seed: int, classes: int | None) -> Iterator[Sample]:
    for key in source.keys():  # noqa: SIM118  not a dict's
        check_key(key)
    ranks = ranks_of(seed, source.keys())
    order = order_of(ranks)
    if len(twice := repeated(ranks, order)):
        key = next(islice(source.keys(), int(twice[0]), None))
        raise ShardError(f"the key {key!r} occurs twice: give every image its own name")
    del ranks
    for start in range(0, len(order), READ_AT_ONCE):
        for sample in source.read(order[start : start + READ_AT_ONCE].tolist()):
            check_sample(sample, classes)
            yield sample


def _write_shards(
    samples: Iterator[Sample], count: int, folder: Path, name: str, samples_per_shard: int
) -> tuple[list[ShardInfo], pa.Table]:
    shards: list[ShardInfo] = []
    tables: list[pa.Table] = []
    with Progress("pack", total=count, unit="images") as progress:
        # A source by number may leave out some of the samples that it announced.
        while (first := next(samples, None)) is not None:
            some = chain([first], islice(samples, samples_per_shard - 1))
            shard, table = write_shard(folder / f"{name}-{len(shards):06d}.tar", some)
            shards.append(shard)
            tables.append(table)
            progress.advance(shard.samples, note=shard.name)
    if not shards:
        raise ShardError("there are no images to pack" + (f": none of {count:,} files is one" if count else ""))
    return shards, pa.concat_tables(tables)


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


# ---- The order of packed samples: by a hash of (seed, key), whatever the order of the source


def rank_of(seed: int, key: str) -> bytes:
    """What samples are sorted by: 32 bytes, equal for equal keys only."""
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def ranks_of(seed: int, keys: Iterable[str]) -> UInt64[np.ndarray, "samples words=4"]:
    """The ranks of many keys as numbers, most significant word first."""
    return np.frombuffer(b"".join(rank_of(seed, key) for key in keys), dtype=">u8").reshape(-1, 4).astype(np.uint64)


def order_of(ranks: UInt64[np.ndarray, "samples words=4"]) -> Int[np.ndarray, " samples"]:
    """The numbers of the samples from the lowest rank to the highest."""
    return np.lexsort(ranks.T[::-1])


def repeated(
    ranks: UInt64[np.ndarray, "samples words=4"], order: Int[np.ndarray, " samples"]
) -> Int[np.ndarray, " repeated"]:
    """The numbers of samples whose key an earlier one has."""
    equal = (ranks[order[1:]] == ranks[order[:-1]]).all(axis=1)
    return order[1:][equal]


# ---- Sorting more samples than fit into memory, by way of files


class Buckets:
    """Samples that come in any order and leave in that of their ranks.

    Memory: ``buffer`` bytes while they come; while they leave, about 100 bytes for each sample of one bucket, which
    holds 1/256 of all. Disk: one copy of the images, freed as they leave; none if all fit into ``buffer``.
    """

    def __init__(self, folder: Path, seed: int, buffer: int = 64 << 20) -> None:
        self._folder, self._seed, self._buffer = folder, seed, buffer
        self._waiting: dict[int, list[bytes]] = {}
        self._waiting_bytes = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sample: Sample) -> None:
        """Take in a sample."""
        rank = rank_of(self._seed, sample.key)
        key, extension = sample.key.encode(), sample.extension.encode()
        label = NO_LABEL if sample.label is None else sample.label
        header = HEADER.pack(rank, len(key), len(extension), len(sample.image), label)
        self._waiting.setdefault(rank[0], []).extend((header, key, extension, sample.image))
        self._waiting_bytes += HEADER.size + len(key) + len(extension) + len(sample.image)
        self._count += 1
        if self._waiting_bytes > self._buffer:
            self._flush()

    def drain(self) -> Iterator[Sample]:
        """The samples by rank; each leaves once.

        Raises:
            ShardError: two samples have one key.
        """
        for number in range(256):
            path = self._path(number)
            waiting = b"".join(self._waiting.pop(number, ()))
            if not path.exists():
                yield from _sorted(io.BytesIO(waiting))
                continue
            with path.open("ab+") as file:
                file.write(waiting)
                yield from _sorted(file)
            path.unlink()

    def _flush(self) -> None:
        for number, pieces in self._waiting.items():
            with self._path(number).open("ab") as file:
                file.writelines(pieces)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"bucket-{number:03d}"


def _sorted(file: BinaryIO) -> Iterator[Sample]:
    places = []
    file.seek(0)
    while header := file.read(HEADER.size):
        rank, *lengths, label = HEADER.unpack(header)
        places.append((rank, file.tell(), lengths, label))
        file.seek(sum(lengths), io.SEEK_CUR)
    places.sort()
    before = None
    for rank, offset, (key_bytes, extension_bytes, image_bytes), label in places:
        file.seek(offset)
        key = file.read(key_bytes).decode()
        if rank == before:
            raise ShardError(f"the key {key!r} occurs twice: give every image its own name")
        before = rank
        extension = file.read(extension_bytes).decode()
        yield Sample(key, file.read(image_bytes), extension, None if label == NO_LABEL else label)


# ---- Writing one shard: bytes that depend on its samples alone, the same as Python's tarfile writes


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[ShardInfo, pa.Table]:
    """Write one tar without time or owner, flushed to disk.

    Returns:
        The tar's entry in the index, and its table of samples.
    """
    keys, labels = [], []
    with path.open("wb") as file:
        sink = _HashingSink(file)
        for sample in samples:
            _add(sink, f"{sample.key}.{sample.extension.lower()}", sample.image)
            if sample.label is not None:
                _add(sink, f"{sample.key}.cls", b"%d" % sample.label)
            keys.append(sample.key)
            labels.append(sample.label)
        sink.write(bytes(2 * BLOCK))
        sink.write(bytes(-sink.bytes % RECORD))
        sink.flush()
        os.fsync(file.fileno())
    columns = [[path.name] * len(keys), range(len(keys)), keys, labels]
    arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, SAMPLES_SCHEMA)]
    info = ShardInfo(path.name, len(keys), sink.bytes, sink.hash.hexdigest())
    return info, pa.Table.from_arrays(arrays, schema=SAMPLES_SCHEMA)


class _HashingSink:
    """Counts and hashes what it writes, in large pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pieces: list[bytes] = []
        self._flushed = 0
        self.hash = hashlib.sha256()
        self.bytes = 0

    def write(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.bytes += len(piece)
        if self.bytes - self._flushed >= WRITTEN_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        content = b"".join(self._pieces)
        self._pieces.clear()
        self._flushed = self.bytes
        self.hash.update(content)
        self._file.write(content)
        self._file.flush()


def _plain(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry


# All of a header but name, size and checksum is the same for all members.
_BEFORE_SIZE, _TIME, _REST = (
    _plain("", 0).tobuf(tarfile.USTAR_FORMAT)[part] for part in (slice(100, 124), slice(136, 148), slice(156, 512))
)
_SUM = sum(_BEFORE_SIZE) + sum(_TIME) + sum(_REST) + 8 * ord(" ")


def _add(sink: _HashingSink, name: str, content: bytes) -> None:
    sink.write(_header(name, len(content)))
    sink.write(content)
    sink.write(bytes(-len(content) % BLOCK))


def _header(name: str, size: int) -> bytes:
    if len(name) > 100 or not name.isascii() or size >= 8**11:
        return _plain(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    # tarfile takes some 20 µs for this.
    encoded, octal = name.encode(), b"%011o\0" % size
    checksum = b"%06o\0 " % (_SUM + sum(encoded) + sum(octal))
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, octal, _TIME, checksum, _REST))
