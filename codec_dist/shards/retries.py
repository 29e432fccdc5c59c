"""Patience with remote files: what fails for a moment is tried again, and a broken stream goes on where it broke."""

import errno
import itertools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from codec_dist.utils import without_credentials

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
        """The result of ``action``, tried again while its faults are passing ones; the last fault is raised."""
        for pause in self.pauses():
            try:
                return action()
            except Exception as error:
                if not is_transient(error):
                    raise
                _wait(pause, what, error)
        return action()


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
        what: the file, for what is told while waiting.
    """

    def __init__(self, open_at: Callable[[int], _Opened], size: int | None, retries: Retries, what: str) -> None:
        self._open_at, self._size, self._retries, self._what = open_at, size, retries, what
        self._file: Any = None
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, empty at the end; attempts are counted anew whenever any have come."""
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
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for status in (told, getattr(error, "status", None)):
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
