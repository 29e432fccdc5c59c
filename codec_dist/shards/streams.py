"""One opened tar as a stream of samples, through WebDataset, without losing any silently."""

import hashlib
from collections.abc import Iterator
from typing import Any

from codec_dist.shards.errors import ShardError
from codec_dist.shards.location import Readable

PIECE = 1 << 20


class HashingStream:
    """Passes bytes on from a stream, counting and hashing them."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._hash.update(piece)
        self.bytes += len(piece)
        return piece

    def drain(self) -> str:
        """Read to the end; SHA-256 of all that came from the stream (64 hex digits)."""
        while self.read(PIECE):
            pass
        return self._hash.hexdigest()


class FaultCounter:
    """Handler for WebDataset that stops at a fault and remembers it; its own handlers hide the count."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Exception | None = None

    def __call__(self, error: Exception) -> bool:
        self.count += 1
        self.first = self.first or error
        return False

    def __str__(self) -> str:
        return "" if self.first is None else " ".join(str((self.first.args or (self.first,))[0]).split())


def stream_samples(stream: HashingStream, name: str) -> Iterator[dict[str, Any]]:
    """Samples of one tar: ``__key__`` and extension (lower case) → bytes, in the order of the tar.

    A tar that is cut between members, or in a header, ends here without a fault: compare counts.

    Raises:
        ShardError: a member cannot be read, or a sample holds two members of one extension. The sample
            that was being read is not yielded, as it may be incomplete.
    """
    # Here, because it imports torch, which packing and splitting do not need.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    faults = FaultCounter()
    files = tar_file_expander([{"url": name, "stream": stream}], handler=faults)
    for sample in group_by_keys(files, handler=faults):
        if faults.count:
            break
        yield sample
    if faults.count:
        raise ShardError(f"{name} is damaged: {faults}") from faults.first
