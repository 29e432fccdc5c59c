"""One tar, front to back: its members, and its samples by WebDataset's rules; where it breaks off, that is an error.

Python's tarfile is four times slower per small member, and takes a tar that ends at a member's boundary or
inside a header for a shorter one. Read are ustar, GNU (long names, large sizes) and pax archives.
"""

import hashlib
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from codec_dist.shards.errors import DamagedTarError
from codec_dist.shards.location import Readable
from codec_dist.shards.tally import Tally

BLOCK = 512
PIECE = 1 << 20
REGULAR = b"0\x007"
DIRECTORY, PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK, SPARSE = b"5xgLKS"
# They have no data, whatever size their header gives.
LINKS = {ord("1"): "a link", ord("2"): "a link", ord("3"): "a device", ord("4"): "a device", ord("6"): "a pipe"}
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
LARGEST_EXTENSION = 1 << 24
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

# Key and extension, as WebDataset splits them: at the first dot of the file's name.
MEMBER = re.compile(r"((?:.*/)?[^./]*)\.([^/]*)", re.DOTALL)
# Members that WebDataset's readers pass over.
META = re.compile(r"__[^/]*__($|/)")
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")
# What the last part of an extension is for an image, whichever of them a run reads.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
NO_EXTENSION = "members without an extension"
DOTS = "its file name holds dots, and a key ends at the first, which other images share: rename them without dots"


class Member(NamedTuple):
    """A member of a tar: its name, and what it is if it is no plain file (``a link``, ...; else None)."""

    name: str
    oddity: str | None


class TarReader:
    r"""Iterates over the members of a tar; :meth:`content` reads the one that was yielded last.

    A name that is not UTF-8 is given with its odd bytes as ``\xNN``. Directories are left out.

    Raises:
        DamagedTarError: while iterating or reading, where the tar is cut, is no tar, or goes on after its end.
    """

    def __init__(self, stream: Readable, name: str) -> None:
        self._stream, self._name = stream, name
        self._buffer, self._at = b"", 0
        self._passed = 0
        """Bytes that came before the buffer."""
        self._size = self._padding = 0
        self._member = ""
        self._pax_global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        pax = self._pax_global
        while (header := self._header()) is not None:
            kind = header[156]
            if kind in (PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK):
                pax = self._extension(kind, self._size_of(header, {}), pax)
                continue
            self._member = pax.get("path") or _name(header)
            self._size = 0 if kind == DIRECTORY or kind in LINKS else self._size_of(header, pax)
            self._padding = -self._size % BLOCK
            if kind == SPARSE or (pax and any(key.startswith("GNU.sparse") for key in pax)):
                self._refuse(f"{self._member} is a sparse file, which only tar itself can read")
            # Archives of the oldest format mark a folder by the end of its name.
            if kind != DIRECTORY and not self._member.endswith("/"):
                yield Member(self._member, None if kind in REGULAR else LINKS.get(kind, "of an unknown kind"))
            self._skip_rest()
            pax = self._pax_global

    def content(self) -> bytes:
        """The bytes of the member that was yielded last; once per member."""
        content = self._take(self._size)
        if len(content) < self._size:
            self._refuse(f"it is cut in the data of {self._member}, at byte {self._offset():,}")
        self._size = 0
        return content

    def _header(self) -> bytes | None:
        """The next header, None at the end of the tar."""
        header = self._take(BLOCK)
        if len(header) < BLOCK:
            if not self._offset():
                self._refuse("it is empty (0 bytes)")
            where = "in a header" if header else "between two members: the mark of a tar's end is missing"
            self._refuse(f"it is cut {where}, at byte {self._offset():,}")
        if not header[0] and not header.strip(b"\0"):
            self._check_rest()
            return None
        if not _is_sound(header):
            if self._offset() == BLOCK and header.startswith(COMPRESSED):
                self._refuse("it is compressed; decompress it")
            self._refuse_header()
        return header

    def _extension(self, kind: int, size: int, pax: dict[str, str]) -> dict[str, str]:
        """What a header of extensions says of the next member, or of all that follow."""
        if size > LARGEST_EXTENSION:
            self._refuse(f"an extension of a header at byte {self._offset():,} is {size:,} bytes long")
        self._member, self._size, self._padding = "a header's extension", size, -size % BLOCK
        content = self.content()
        self._skip_rest()
        if kind == LONG_LINK:
            return pax
        if kind == LONG_NAME:
            return pax | {"path": _text(content.partition(b"\0")[0])}
        values = pax | self._pax_values(content)
        if kind == PAX_GLOBAL:
            self._pax_global = values
        return values

    def _pax_values(self, content: bytes) -> dict[str, str]:
        values, at = {}, 0
        while at < len(content) and content[at]:
            match = PAX_RECORD.match(content, at)
            end = at + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
                self._refuse(f"a pax header before byte {self._offset():,} is garbled")
            values[_text(match[2])] = _text(content[match.end() : end - 1])
            at = end
        return values

    def _size_of(self, header: bytes, pax: dict[str, str]) -> int:
        if pax.get("size", "").isdecimal():
            return int(pax["size"])
        try:
            return _number(header[124:136])
        except ValueError:
            self._refuse_header()

    def _skip_rest(self) -> None:
        """Pass over what is left of the member's data, and the padding after it."""
        left = self._size + self._padding
        while left:
            piece = self._take(min(left, PIECE))
            if not piece:
                self._refuse(f"it is cut in the data of {self._member}, at byte {self._offset():,}")
            left -= len(piece)
        self._size = self._padding = 0

    def _check_rest(self) -> None:
        end = self._offset()
        while piece := self._take(PIECE):
            if piece.count(0) != len(piece):
                self._refuse(f"it goes on after its end at byte {end:,}, as tars that were joined do; pack it again")

    def _take(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only at the end of the stream."""
        end = self._at + size
        if end > len(self._buffer):
            self._fill(size)
            end = size
        piece = self._buffer[self._at : end]
        self._at += len(piece)
        return piece

    def _fill(self, size: int) -> None:
        self._passed += self._at
        pieces = [self._buffer[self._at :]]
        have = len(pieces[0])
        while have < size:
            piece = self._stream.read(max(PIECE, size - have))
            if not piece:
                break
            pieces.append(piece)
            have += len(piece)
        self._buffer, self._at = b"".join(pieces), 0

    def _offset(self) -> int:
        return self._passed + self._at

    def _refuse_header(self) -> NoReturn:
        self._refuse(f"the header at byte {self._offset() - BLOCK:,} is not one of a tar")

    def _refuse(self, problem: str) -> NoReturn:
        raise DamagedTarError(f"{self._name} is damaged: {problem}")


def _is_sound(header: bytes) -> bool:
    """Whether a header's checksum fits."""
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    # Adler-32 holds the sum of all bytes modulo 65,521, and is computed far faster than a sum is.
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    if (total - stored) % 65521 == 0:
        return True
    # Some old archivers took bytes for signed numbers.
    rest = header[:148] + header[156:]
    return sum(rest) - 256 * sum(byte > 127 for byte in rest) + 8 * ord(" ") == stored


def _number(field: bytes) -> int:
    if field[:1] == b"\x80":  # GNU's way to write what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits, 8) if digits else 0


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # GNU's magic is "ustar  ": it uses the bytes of the prefix otherwise.
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")


# ---- One opened tar as a stream of samples by WebDataset's rules, without losing any silently


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
    problem: str | None = None
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
        DamagedTarError: the tar is cut short or no tar. The sample before the damage is not yielded, as it may
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
        problem = sample.problem if sample.problem is not None and sample.repeats is None else DOTS
        for extension in dotted:
            yield RawSample(f"{key}.{extension}{again}", {extension: sample.members[extension]}, problem)


def _enter(
    sample: RawSample, extension: str, oddity: str | None, tar: TarReader, wanted: Collection[str] | None
) -> None:
    if extension in sample.members:
        sample.problem = sample.problem or f"there are two members .{extension}: which one counts is not known"
    elif oddity:
        sample.problem = sample.problem or f"the member .{extension} is {oddity}, not a file"
        sample.members[extension] = b""
    else:
        sample.members[extension] = tar.content() if wanted is None or extension in wanted else b""
