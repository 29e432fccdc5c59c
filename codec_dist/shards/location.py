"""Folders of shards, or the shards in one that a pattern names: local paths, and URLs through fsspec, with retries."""

import errno
import hashlib
import itertools
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import fsspec

from codec_dist.shards.errors import ShardError
from codec_dist.shards.patterns import NamePattern, is_compressed_name, is_pattern, is_tar_name
from codec_dist.utils import without_credentials, write_bytes_atomically

# Each remote scheme and the package that fsspec needs for it.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PARTIAL_CONTENT = 206
WEB = ("http", "https")
# Object stores are read in ranges of this size.
RANGE_BYTES = 8 << 20
SECONDS_TO_CONNECT, SECONDS_TO_ANSWER = 30.0, 60.0

T = TypeVar("T")

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
# EBUSY and EREMOTEIO are s3fs's names for the statuses 503 and 500.
TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    getattr(errno, "EREMOTEIO", errno.EBUSY),
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# By name, so that aiohttp and botocore need not be imported to recognise their errors.
TRANSIENT_CLASSES = {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "IncompleteRead"}
PERMANENT_ERRNO = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
# Pauses shorter than this are not worth a line.
TOLD_FROM_SECONDS = 2.0


@runtime_checkable
class Readable(Protocol):
    """A stream of bytes, read from front to back."""

    def read(self, size: int = -1, /) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        ...


@dataclass(frozen=True)
class Retries:
    """How often and how patiently a remote operation is tried.

    The pause doubles from ``pause`` up to ``longest`` seconds: by default 7 attempts within about 32 seconds.
    """

    attempts: int = 7
    pause: float = 0.5
    longest: float = 30.0

    def pauses(self) -> Iterator[float]:
        """Seconds to wait before the second attempt, the third, …"""
        return itertools.islice((min(self.pause * 2**n, self.longest) for n in itertools.count()), self.attempts - 1)

    def call(self, action: Callable[[], T], what: str) -> T:
        """The result of ``action``, tried again while its errors are passing ones; the last is raised."""
        for pause in self.pauses():
            try:
                return action()
            except Exception as error:
                if not is_transient(error):
                    raise
                _wait(pause, what, error)
        return action()


class Location:
    """A folder of shards on disk, in an object store or on a web server.

    The last part of a path or URL may be a pattern, such as ``train-*.tar`` or ``train-{000..012}.tar`` (on web servers
    it must end with ``.tar``): then only the tars of these names belong to it. A local folder of that very name is
    a folder.

    What fails for a moment (a busy server, a lost connection) is tried again, as ``retries`` says; local
    files are not.

    Raises:
        ShardError: the scheme is none of the supported ones, its package is not installed, or the pattern is none.
    """

    def __init__(self, text: str | Path, retries: Retries | None = None) -> None:
        scheme = re.match(r"([^/]+)://", str(text))
        self.scheme = scheme[1].lower() if scheme else None
        if self.scheme is None:
            self.text = str(Path(text).expanduser().absolute())
        elif self.scheme in PACKAGES:
            self.text = str(text).rstrip("/")
        else:
            schemes = ", ".join(f"{known}://" for known in PACKAGES)
            raise ShardError(
                f"cannot read {text}: shards are read from local paths, {schemes}; copy them to one of these"
            )
        self.folder, self.pattern = self._split()
        self._retries = Retries(attempts=1) if self.scheme is None else retries or Retries()
        try:
            # Never through fsspec's URL parser: it accepts chains of schemes and caches.
            self._files: Any = fsspec.filesystem(self.scheme or "file", use_listings_cache=False, **self._options())
        except ImportError as error:
            package = PACKAGES.get(self.scheme or "", "fsspec")
            raise ShardError(f"reading {self.text} needs the package {package}: pip install {package}") from error

    def __str__(self) -> str:
        return self.text

    @property
    def is_local(self) -> bool:
        return self.scheme is None

    @property
    def index_stem(self) -> str:
        """What the files of its index are called: those of a pattern lie beside the whole folder's."""
        if self.pattern is None:
            return "index"
        return f"index-{hashlib.sha256(self.pattern.text.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"

    def path(self, name: str) -> str:
        """The full path or URL of the file ``name``."""
        if self.scheme not in WEB:
            return f"{self.folder}/{name}"
        # A signature stands behind the path.
        folder, mark, query = self.folder.partition("?")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"

    def tars(self) -> dict[str, int | None]:
        """Name and size in bytes (None where unknown) of every tar that belongs to it, in the order of names.

        Raises:
            ShardError: there is no such folder, it cannot be listed, some of its tars are compressed or parts of one,
                or the pattern names tars that do not exist.
        """
        if self.scheme in WEB and self.pattern is not None and self.pattern.is_exact:
            return {name: self.size(name) for name in sorted(self.pattern.names)}  # many web servers list nothing
        with self._explained_errors("list"):
            entries = self._retries.call(lambda: self._files.ls(self.folder, detail=True), self.folder)
        sizes = {self._name_of(entry): entry.get("size") for entry in entries}
        meant = [name for name in sorted(sizes) if self.pattern is None or self.pattern.matches(name)]
        if compressed := [name for name in meant if is_compressed_name(name)]:
            raise ShardError(
                f"{len(compressed):,} of the tars in {self.text} are compressed or incomplete, first {compressed[0]}: "
                "shards are read as plain tars; decompress or complete them, or move them elsewhere"
            )
        found = {name: sizes[name] for name in meant if is_tar_name(name)}
        self._check_pattern(found, [name for name in sizes if is_tar_name(name)])
        return found

    def _split(self) -> tuple[str, NamePattern | None]:
        """The folder, and the pattern of names in it if there is one."""
        folder, _, name = self.text.rpartition("/")
        if not is_pattern(name) or (self.scheme is None and Path(self.text).is_dir()):
            return self.text, None
        if self.scheme in WEB and not is_tar_name(name) and not is_compressed_name(name):
            return self.text, None  # in a URL, a question mark begins its query
        return folder or "/", NamePattern(name)

    def _check_pattern(self, found: Collection[str], tars: Collection[str]) -> None:
        if self.pattern is None:
            return
        if missing := sorted(self.pattern.names - set(found)):
            raise ShardError(
                f"{len(missing):,} of {len(self.pattern.names):,} tars that {self.text} names do not exist, first "
                f"{missing[0]}: check data.shards"
            )
        if not found:
            holds = f"it holds {len(tars):,} tars, first {min(tars)}" if tars else "it holds no tars"
            raise ShardError(f"no tar in {self.folder} matches {self.pattern.text} ({holds}): check data.shards")

    def size(self, name: str) -> int | None:
        """Size in bytes of the file ``name``, None where the server does not tell."""
        with self._explained_errors("read", name):
            size = self._retries.call(lambda: self._files.info(self.path(name)), self.path(name)).get("size")
        return None if size is None else int(size)

    def read(self, name: str) -> bytes | None:
        """Content of the file ``name``, None if there is none."""
        with self._explained_errors("read", name):
            try:
                return bytes(self._retries.call(lambda: self._files.cat_file(self.path(name)), self.path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write the file ``name`` whole or not at all.

        Raises:
            OSError: the folder is read-only or full.
        """
        if self.is_local:
            write_bytes_atomically(Path(self.path(name)), content)
            return
        try:
            self._retries.call(lambda: self._files.pipe_file(self.path(name), content), self.path(name))
        except NotImplementedError as error:
            raise PermissionError(f"{self.scheme}:// is read-only") from error
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _name_of(self, entry: dict[str, Any]) -> str:
        name = str(entry["name"]).rsplit("/", 1)[-1]
        return name.partition("?")[0] if self.scheme in WEB else name

    @contextmanager
    def open(self, name: str, size: int | None = None) -> Iterator[Readable]:
        """The file ``name`` (of ``size`` bytes, where that is known) as a stream, read from front to back."""
        if self.is_local:
            with self._explained_errors("read", name):
                file = self._files.open(self.path(name), "rb")
        else:
            file = ResumingStream(lambda start: self._open_at(name, start), size, self._retries, self.path(name))
        try:
            yield _Explained(file, lambda: self._explained_errors("read", name))
        finally:
            file.close()

    def _open_at(self, name: str, start: int) -> Any:
        """The remote file ``name``, from byte ``start`` on."""
        if self.scheme not in WEB:
            file = self._files.open(self.path(name), "rb", block_size=RANGE_BYTES)
            file.seek(start)
            return file
        # Block size 0 asks for one plain stream instead of many ranges; a size of 1 spares asking for the true one.
        headers = {"headers": {"Range": f"bytes={start}-"}} if start else {}
        file = self._files.open(self.path(name), "rb", block_size=0, size=1, **headers)
        try:
            left = 0 if file.r.status == PARTIAL_CONTENT else start
            while left:  # Servers may send the whole file again.
                left -= len(piece := file.read(min(left, RANGE_BYTES)))
                if not piece:
                    raise ConnectionResetError(f"the stream ended before byte {start:,}, where it had broken off")
        except BaseException:
            file.close()
            raise
        return file

    def _options(self) -> dict[str, Any]:
        if self.scheme not in WEB:
            return {}
        import aiohttp

        # aiohttp's default ends every download after five minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_TO_CONNECT, sock_read=SECONDS_TO_ANSWER)
        return {"client_kwargs": {"timeout": timeout}}

    @contextmanager
    def _explained_errors(self, verb: str, name: str = "") -> Iterator[None]:
        place = self.path(name) if name else self.folder
        try:
            yield
        except ShardError:
            raise
        except FileNotFoundError as error:
            if error.__cause__ is not None and is_transient(error.__cause__):
                # fsspec calls any file that a web server does not tell of missing.
                raise _explained_error(verb, place, error.__cause__) from error
            what = "file" if name else "folder"
            raise ShardError(
                f"cannot {verb} {place}: there is no such {what}; check the path in data.shards"
            ) from error
        except NotADirectoryError as error:
            raise ShardError(f"cannot {verb} {place}: it is a file; name the folder that holds the shards") from error
        except Exception as error:
            raise _explained_error(verb, place, error) from error


def shards_folder(location: str | Path) -> str:
    """The folder or URL of the shards that a location means, without its pattern."""
    return Location(location).folder


class _Explained:
    """A stream whose errors say what could not be read."""

    def __init__(self, stream: Any, explained: Callable[[], AbstractContextManager[None]]) -> None:
        self._stream, self._explained = stream, explained

    def read(self, size: int = -1) -> bytes:
        with self._explained():
            piece: bytes = self._stream.read(size)
        return piece


def _explained_error(verb: str, place: str, error: BaseException) -> ShardError:
    return ShardError(f"cannot {verb} {place}: {type(error).__name__}: {' '.join(str(error).split())}")


# ---- Patience: what fails for a moment is tried again, and a broken stream goes on where it broke


def is_transient(error: BaseException) -> bool:
    """Whether an error of a remote file system may pass by itself: a busy server, a lost connection, a time-out."""
    cause: BaseException | None = error
    while cause is not None:
        status = _status(cause)
        if status is not None:
            return status in TRANSIENT_STATUS
        reason = getattr(cause, "os_error", cause)
        if isinstance(reason, socket.gaierror):
            return reason.errno not in PERMANENT_ERRNO
        if isinstance(cause, ConnectionError | TimeoutError) or getattr(cause, "errno", None) in TRANSIENT_ERRNO:
            return True
        if TRANSIENT_CLASSES & {kind.__name__ for kind in type(cause).__mro__}:
            return True
        cause = cause.__cause__
    return False


class _Opened(Protocol):
    """An opened file."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...


class ResumingStream:
    """A remote file as one stream of bytes; when the connection breaks, it is opened again at the same byte.

    Args:
        open_at: opens the file so that the next byte read is that of the given number.
        size: bytes of the file, where known: a stream that ends before is broken.
        what: the file, for the message while waiting.
    """

    def __init__(self, open_at: Callable[[int], _Opened], size: int | None, retries: Retries, what: str) -> None:
        self._open_at, self._size, self._retries, self._what = open_at, size, retries, what
        self._file: Any = None
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, empty at the end; attempts are counted again whenever any have come."""
        piece = self._retries.call(lambda: self._read(size), self._what)
        self._position += len(piece)
        return piece

    def close(self) -> None:
        """Close the connection."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open_at(self._position)
            piece: bytes = self._file.read(size)
            if not piece and size and self._size is not None and self._position < self._size:
                raise ConnectionResetError(f"the stream ended after {self._position:,} of {self._size:,} bytes")
        except BaseException:
            self.close()
            raise
        return piece


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, botocore or gcsfs tells of."""
    response = getattr(error, "response", None)
    recognised = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for status in (recognised, getattr(error, "status", None)):
        if isinstance(status, int):
            return status
    # gcsfs calls it so, with a number or its digits.
    code = str(getattr(error, "code", "")) if not hasattr(error, "status") else ""
    return int(code) if code.isdecimal() and len(code) == 3 else None


def _wait(pause: float, what: str, error: BaseException) -> None:
    if pause >= TOLD_FROM_SECONDS:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(without_credentials(f"{what}: {reason}; trying again in {pause:g} s\n"))
    time.sleep(pause)
