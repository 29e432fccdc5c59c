"""One opened tar as a stream of samples by WebDataset's rules, without losing any silently."""

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from codec_dist.shards.location import Readable
from codec_dist.shards.tally import Tally
from codec_dist.shards.tar import PIECE, TarReader

# Key and extension, as WebDataset splits them: at the first dot of the file's name.
MEMBER = re.compile(r"((?:.*/)?[^./]*)\.([^/]*)", re.DOTALL)
# Members that WebDataset's readers pass over.
META = re.compile(r"__[^/]*__($|/)")
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
# What the last part of an extension is for an image, whichever of them a run reads.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
NO_EXTENSION = "members without an extension"
DOTS = "its file name holds dots, and a key ends at the first, which other images share: rename them without dots"


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


def stream_samples(
    stream: Readable,
    name: str,
    wanted: Collection[str] | None = None,
    image_fields: Collection[str] = (),
    passed_over: Tally | None = None,
) -> Iterator[RawSample]:
    """The samples of one tar, in its order; nothing that it holds can make one vanish or stop the others.

    Several images whose names hold dots, so that their keys end at the same dot, are one unusable sample each.

    Args:
        stream: the tar.
        name: its path, for errors.
        wanted: extensions (lower case) whose content is read; default: all.
        image_fields: extensions with dots, such as ``left.png``, that hold an image of their sample on purpose.
        passed_over: counts the members that belong to no sample.

    Raises:
        DamagedTarError: the tar is cut short or no tar. The sample before the fault is not yielded, as it may
            be incomplete.
    """
    passed_over = Tally() if passed_over is None else passed_over
    occurrences: dict[str, int] = {}
    current: str | None = None
    sample: RawSample | None = None
    tar = TarReader(stream, name)
    for member, oddity in tar:
        split = MEMBER.fullmatch(member)
        reason = why_passed_over(member) or (NO_EXTENSION if split is None else None)
        if split is None or reason is not None:
            passed_over.add(reason or NO_EXTENSION, f"{member} in {name}")
            continue
        key, extension = split.groups()
        if sample is None or key != current:
            if sample is not None:
                yield from _by_image(sample, image_fields, passed_over)
            current = key
            occurrences[key] = count = occurrences.get(key, 0) + 1
            sample = RawSample(key, {}) if count == 1 else _repeated(key, count)
        _enter(sample, extension.lower(), oddity, tar, wanted)
    if sample is not None:
        yield from _by_image(sample, image_fields, passed_over)


def why_passed_over(path: str) -> str | None:
    """Why a member, or a file of a folder, is no part of a data set by its path alone; None if it may be one."""
    folders, _, name = path.rpartition("/")
    if name.startswith("._") or "__MACOSX" in folders.split("/") or name.lower() in SYSTEM_FILES:
        return "files of macOS or Windows (._*, __MACOSX, .DS_Store, Thumbs.db, desktop.ini)"
    if name.startswith("."):
        return "files whose names begin with a dot"
    if path.startswith("__") and META.match(path):
        return "members of the form __NAME__, which WebDataset passes over"
    return None


def dotted_fields(image_fields: Collection[str]) -> tuple[str, ...]:
    """Those of ``data.image_fields`` that hold dots, in lower case; they decide what is one sample."""
    return tuple(sorted({each.lower() for each in image_fields if "." in each}))


def repeated_key(key: str) -> str:
    """Why no sample of a key can be used that occurs again, apart from its other members."""
    return f"the key {key!r} occurs several times in this tar, apart from each other: which image it means is not known"


def _repeated(key: str, count: int) -> RawSample:
    return RawSample(f"{key}.duplicate-{count}", {}, repeated_key(key), repeats=key)


def _by_image(sample: RawSample, image_fields: Collection[str], passed_over: Tally) -> Iterator[RawSample]:
    """The sample; or, where it is several images whose names hold dots, an unusable one for each of them."""
    dotted = [each for each in sample.members if "." in each and each.rpartition(".")[2] in IMAGE_SUFFIXES]
    if not dotted or any(each in image_fields for each in sample.members):
        yield sample
    elif any(each in IMAGE_SUFFIXES for each in sample.members):
        passed_over.add(
            "further images, with dots in their names, of samples that have one",
            f"{sample.key}.{dotted[0]}",
            len(dotted),
        )
        yield sample
    elif len(dotted) == 1:
        yield sample
    else:
        key, again = (sample.key, "") if sample.repeats is None else (sample.repeats, sample.key[len(sample.repeats) :])
        fault = sample.fault if sample.fault is not None and sample.repeats is None else DOTS
        for extension in dotted:
            yield RawSample(f"{key}.{extension}{again}", {extension: sample.members[extension]}, fault)


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
