"""One opened tar as a stream of samples by WebDataset's rules, without losing any silently."""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from codec_dist.shards.location import Readable
from codec_dist.shards.tar import PIECE, TarReader

# Members that WebDataset's readers pass over.
META = re.compile(r"__[^/]*__($|/)")


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


@dataclass(slots=True)
class RawSample:
    """Adjacent members of a tar that share a key."""

    key: str
    """Unique in its tar: the second sample of a key is called ``KEY.duplicate-2``, which no member can be."""
    members: dict[str, bytes]
    """Extension in lower case → content; empty where it was not wanted."""
    fault: str | None = None
    """Why the sample cannot be used, as far as its members' names tell."""
    repeats: str | None = None
    """The key that an earlier sample of this tar has, too."""


def stream_samples(stream: Readable, name: str, wanted: Collection[str] | None = None) -> Iterator[RawSample]:
    """The samples of one tar, in its order; nothing that it holds can make one vanish or stop the others.

    Args:
        stream: the tar.
        name: its path, for errors.
        wanted: extensions (lower case) whose content is read; default: all.

    Raises:
        DamagedTarError: the tar is cut short or no tar. The sample before the fault is not yielded, as it may
            be incomplete.
    """
    # Here, because it imports torch, which packing and splitting do not need.
    from webdataset.tariterators import base_plus_ext

    occurrences: dict[str, int] = {}
    current: str | None = None
    sample: RawSample | None = None
    tar = TarReader(stream, name)
    for member, oddity in tar:
        key, extension = base_plus_ext(member)
        if key is None or (member[0] == "_" and META.match(member)):
            continue
        if sample is None or key != current:
            if sample is not None:
                yield sample
            current = key
            occurrences[key] = count = occurrences.get(key, 0) + 1
            sample = RawSample(key, {}) if count == 1 else _repeated(key, count)
        _enter(sample, extension.lower(), oddity, tar, wanted)
    if sample is not None:
        yield sample


def repeated_key(key: str) -> str:
    """Why no sample of a key can be used that occurs again, apart from its other members."""
    return f"the key {key!r} occurs several times in this tar, apart from each other: which image it means is not known"


def _repeated(key: str, count: int) -> RawSample:
    return RawSample(f"{key}.duplicate-{count}", {}, repeated_key(key), repeats=key)


def _enter(
    sample: RawSample, extension: str, oddity: str | None, tar: TarReader, wanted: Collection[str] | None
) -> None:
    if extension in sample.members:
        sample.fault = sample.fault or f"there are two members .{extension}: which one counts is not known"
    elif oddity:
        sample.fault = sample.fault or f"the member .{extension} is {oddity}, not a file"
        sample.members[extension] = b""
    else:
        sample.members[extension] = tar.content() if wanted is None or extension in wanted else b""
