"""Where a store is: a folder on disk, whose files are whole or absent, or a prefix of an object store."""

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from codec_dist.store.errors import StoreError
from codec_dist.store.storage import Item, Place, Result

# Files that are being written, or were when a process was killed.
PARTIAL = ".partial"

PIECE_BYTES = 256 * 1024
# On ext4 one request for 4 MB took up to ten times as long as four for 1 MB, while much of the memory was in use.
WRITTEN_AT_ONCE = 1024 * 1024

# What a file system without hard links (FAT, some network shares) answers.
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


def open_place(location: str | Path | Place) -> Place:
    """The place at a local path, or at a URL of one of the supported schemes.

    Raises:
        StoreError: another scheme, or its package is not installed.
    """
    if isinstance(location, Place):
        return location
    if re.match(r"[^/]+://", str(location)):
        from codec_dist.store.objects import ObjectPlace

        return ObjectPlace(str(location))
    return LocalPlace(Path(location))


class LocalPlace(Place):
    """A folder on a local or network disk. Files are written beside their place and renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = str(path)

    @property
    def is_local(self) -> bool:
        return True

    @property
    def patience(self) -> float:
        return 0.0

    def is_folder(self) -> bool:
        return self.path.is_dir()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self._at(name), "rb") as file:
            if start < 0:
                start = max(0, os.fstat(file.fileno()).st_size + start)
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def read_into(self, name: str, target: np.ndarray, each: Callable[[np.ndarray], None]) -> int:
        content = target.reshape(-1).view(np.uint8)
        read = 0
        with open(self._at(name), "rb", buffering=0) as file:
            while read < len(content) and (count := file.readinto(content[read : read + PIECE_BYTES].data)):
                each(content[read : read + count])
                read += count
        return read

    def write(self, name: str, content: bytes) -> None:
        with self._replacing(name) as file:
            _write_all(file, memoryview(content))

    def write_from(self, name: str, source: np.ndarray, size: int) -> None:
        content = source.reshape(-1).view(np.uint8)
        with self._replacing(name) as file:
            _write_all(file, content.data)
            if len(content) < size:
                file.truncate(size)

    def create(self, name: str, content: bytes) -> bool:
        temporary, file = self._open_temporary(name)
        try:
            with file:
                _write_all(file, memoryview(content))
            # The file server itself refuses a link to a name that is taken, and the file appears with its content.
            os.link(temporary, self._at(name))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._create_without_links(name, content)
        finally:
            os.unlink(temporary)
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with self._replacing(name) as raw:
            with os.fdopen(os.dup(raw.fileno()), "wb") as file:
                yield file
            os.fsync(raw.fileno())

    def delete(self, name: str) -> None:
        try:
            os.unlink(self._at(name))
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(self._at(name)):
                raise
            shutil.rmtree(self._at(name))

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._at(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def version(self, name: str) -> str | None:
        try:
            status = os.stat(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"

    def files(self, folder: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        waiting = [folder]
        while waiting:
            below = waiting.pop()
            try:
                entries = os.scandir(self._at(below))
            except (FileNotFoundError, NotADirectoryError):
                continue
            with entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(name)
                    else:
                        # A file that is being written may be gone by now.
                        with suppress(FileNotFoundError):
                            found[name] = entry.stat().st_size
        return found

    def age(self, name: str) -> float | None:
        # On a network disk the times of files are the server's: compare with those of a file made now.
        probe, file = self._open_temporary(name)
        try:
            file.close()
            return os.stat(probe).st_mtime - os.stat(self._at(name)).st_mtime
        except FileNotFoundError:
            return None
        finally:
            os.unlink(probe)

    def touch(self, name: str, content: bytes) -> None:
        os.utime(self._at(name))

    def publish(self, folder: str, files: Mapping[str, bytes], first: str) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"cannot make a store at {self.path}: it is a file; choose another path")
        self.path.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder}.", suffix=PARTIAL, dir=self.path))
        try:
            for name, content in files.items():
                path = work / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                (work / folder).rename(self.path / folder)
            except OSError:
                # Another process was faster.
                if not (self.path / folder / first).exists():
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return [function(item) for item in items]

    def _at(self, name: str) -> str:
        return f"{self.text}/{name}" if name else self.text

    def _create_without_links(self, name: str, content: bytes) -> bool:
        try:
            with open(self._at(name), "xb", buffering=0) as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Any]:
        temporary, file = self._open_temporary(name)
        try:
            with file:
                yield file
            os.replace(temporary, self._at(name))
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def _open_temporary(self, name: str) -> tuple[str, Any]:
        folder, _, base = self._at(name).rpartition("/")
        path = f"{folder}/.{base}.{uuid.uuid4().hex}{PARTIAL}"
        try:
            return path, open(path, "xb", buffering=0)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            return path, open(path, "xb", buffering=0)


def _write_all(file: Any, content: memoryview) -> None:
    written = 0
    while written < len(content):
        written += file.write(content[written : written + WRITTEN_AT_ONCE])
