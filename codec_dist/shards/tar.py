"""The members of one tar from a stream, front to back; a tar that breaks off is an error wherever it does.

Python's tarfile is four times slower per small member, and takes a tar that ends at a member's boundary or
inside a header for a shorter one. Read are ustar, GNU (long names, large sizes) and pax archives.
"""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from codec_dist.shards.errors import DamagedTarError
from codec_dist.shards.location import Readable

BLOCK = 512
PIECE = 1 << 20
REGULAR = b"0\x007"
DIRECTORY, PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK, SPARSE = b"5xgLKS"
# They have no data, whatever size their header gives.
LINKS = {ord("1"): "a link", ord("2"): "a link", ord("3"): "a device", ord("4"): "a device", ord("6"): "a pipe"}
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
LARGEST_EXTENSION = 1 << 24
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


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

    def _refuse(self, fault: str) -> NoReturn:
        raise DamagedTarError(f"{self._name} is damaged: {fault}")


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
