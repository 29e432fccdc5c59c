"""What a store asks of the storage where it is: named files that are whole or absent, below one folder or prefix."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import IO, TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


class Place(ABC):
    """A folder of files, named by their paths relative to it with ``/`` between the parts.

    Reading a file that is not there raises FileNotFoundError; whatever else goes wrong is an OSError.
    """

    text: str
    """The folder's path or URL."""

    def __str__(self) -> str:
        return self.text

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether this is a folder on disk."""

    @property
    @abstractmethod
    def patience(self) -> float:
        """Seconds for which a request is made again while the server is busy; 0 where there is none."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether there is a folder here, or a file below the prefix."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A file's bytes from ``start`` (from the end, if negative) to ``stop``."""

    @abstractmethod
    def read_into(self, name: str, target: np.ndarray, each: Callable[[np.ndarray], None]) -> int:
        """Fill an array in C order with the front of a file; returns the bytes that there were for it.

        ``each`` is called with the bytes (uint8) of one piece after the other, while they are in the processor's
        cache.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all, and replace what is there."""

    @abstractmethod
    def write_from(self, name: str, source: np.ndarray, size: int) -> None:
        """As :meth:`write`, the bytes of an array in C order, filled up with zeros to ``size`` bytes."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one already; of several writers, on any machine, one alone gets True."""

    @abstractmethod
    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to write to, which takes its place when the block ends without error."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all below it; nothing happens where there is none."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""

    @abstractmethod
    def version(self, name: str) -> str | None:
        """A text that is another one once a file is written again, None if there is no file."""

    @abstractmethod
    def files(self, folder: str = "") -> dict[str, int]:
        """Name and bytes of every file below a folder, in no order."""

    @abstractmethod
    def age(self, name: str) -> float | None:
        """Seconds since a file was written or touched, None if there is none.

        By the clock of the disk or server that keeps the files, not by this machine's.
        """

    @abstractmethod
    def touch(self, name: str, content: bytes) -> None:
        """Make the age of a file, which holds ``content``, zero."""

    @abstractmethod
    def publish(self, folder: str, files: Mapping[str, bytes], first: str) -> None:
        """Make a folder with the file ``first``, unless there is one; on disk, all files appear with it at once."""

    @abstractmethod
    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``[function(item) for item in items]``, at once where waiting for a server takes the time."""
