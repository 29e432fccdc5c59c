"""Writing one shard: bytes that depend on its samples alone, the same as Python's tarfile writes."""

import hashlib
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from codec_dist.shards.samples import Sample
from codec_dist.shards.scanning import SAMPLES_SCHEMA, ShardInfo

BLOCK, RECORD = 512, 10240
WRITTEN_AT_ONCE = 1 << 20


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
