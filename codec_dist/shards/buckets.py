"""Sorting more samples than fit into memory: parted into files by the first byte of their rank, then file by file."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from codec_dist.shards.errors import ShardError
from codec_dist.shards.samples import Sample
from codec_dist.shards.shuffling import rank_of

# Rank, bytes of the key, of the extension and of the image, label (-1: none).
HEADER = struct.Struct("<32sIBQq")
NO_LABEL = -1


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
