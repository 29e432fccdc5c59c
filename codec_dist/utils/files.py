"""Files that are either whole or absent."""

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codec_dist.utils.errors import CodecError

# A full disk, a quota, and the largest file that a process may write. Libraries that are not written in Python, and
# errors that come from other processes, tell them in words only.
FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write",
}
FULL_IN_WORDS = {
    errno.ENOSPC: ("No space left on device", "os error 28", "StorageFull"),
    errno.EDQUOT: ("Disk quota exceeded", "os error 122"),
    errno.EFBIG: ("File too large", "os error 27"),
}


class DiskFullError(CodecError):
    """A file cannot be written because there is no space for it."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(
            f"cannot write {path}: {reason}; free space there (or choose another run.directory), then run the same "
            "command again: what is done is kept"
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.reason)


def full_disk(error: BaseException) -> str | None:
    """Why there was no space, in words, if that is what an error is about, or one that caused it or was being handled
    when it was raised; else None.
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        for number, words in FULL.items():
            if getattr(found, "errno", None) == number or any(each in str(found) for each in FULL_IN_WORDS[number]):
                return words
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return None


@contextmanager
def naming_full_disk(path: str | Path, *, own: bool = False) -> Iterator[None]:
    """Turn whatever a full disk makes of writing to ``path`` into a DiskFullError; other errors pass.

    ``own``: an error that names its file is reported with that.
    """
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise DiskFullError((own and getattr(error, "filename", None)) or path, reason) from error


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or all of the new.

    The bytes are flushed to disk before the rename, so a marker that exists can be trusted.

    Raises:
        DiskFullError: there is no space; the temporary file is removed.
        OSError: the folder cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """The same with what ``write`` leaves in the temporary file that it is given.

    Raises:
        DiskFullError, OSError: as :func:`write_bytes_atomically`.
    """
    with naming_full_disk(path):
        _write_atomically(path, write)


def absolute_location(location: str | Path) -> str:
    """A local path made absolute, for processes that run in other folders; a URL as it is."""
    return str(location) if "://" in str(location) else str(Path(location).resolve())


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        json.JSONDecodeError: the file is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
