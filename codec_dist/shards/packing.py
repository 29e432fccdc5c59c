"""From images to shards: shuffled by a seed, byte for byte the same on every packing."""

import operator
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from codec_dist.shards.buckets import Buckets
from codec_dist.shards.classes import write_classes
from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardIndex, fingerprint_of, load_index, write_index
from codec_dist.shards.location import Location
from codec_dist.shards.samples import AddressableSource, Sample, check_key, check_sample
from codec_dist.shards.scanning import ShardInfo
from codec_dist.shards.shuffling import order_of, ranks_of, repeated
from codec_dist.shards.tar_writing import write_shard
from codec_dist.utils import Progress

# Samples that are asked of an addressable source together.
READ_AT_ONCE = 256
# Sources with fewer images are read before a bar could be seen.
SHOWN_FROM = 10_000


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
        raise ShardError(f"{samples_per_shard} samples per shard were asked: at least 1 is needed")
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
