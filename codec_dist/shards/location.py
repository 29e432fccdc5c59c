"""Folders of shards: local paths, and URLs through fsspec."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import fsspec

from codec_dist.shards.errors import ShardError
from codec_dist.utils import write_bytes_atomically

# Each remote scheme and the package that fsspec needs for it.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


@runtime_checkable
class Readable(Protocol):
    """A stream of bytes, read from front to back."""

    def read(self, size: int = -1, /) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        ...


class Location:
    """A folder of shards on disk, in an object store or on a web server.

    Raises:
        ShardError: the scheme is none of the supported ones, or its package is not installed.
    """

    def __init__(self, text: str | Path) -> None:
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
        try:
            # Never through fsspec's URL parser: it accepts chains of schemes and caches.
            self._files: Any = fsspec.filesystem(self.scheme or "file", use_listings_cache=False)
        except ImportError as error:
            package = PACKAGES.get(self.scheme or "", "fsspec")
            raise ShardError(f"reading {self.text} needs the package {package}: pip install {package}") from error

    def __str__(self) -> str:
        return self.text

    @property
    def is_local(self) -> bool:
        return self.scheme is None

    def path(self, name: str) -> str:
        """The full path or URL of the file ``name``."""
        return f"{self.text}/{name}"

    def tars(self) -> dict[str, int | None]:
        """Name and size in bytes (None where unknown) of every tar, in the order of names.

        Raises:
            ShardError: there is no such folder, or it cannot be listed.
        """
        with self._faults("list"):
            entries = self._files.ls(self.text, detail=True)
        sizes = {str(entry["name"]).rsplit("/", 1)[-1]: entry.get("size") for entry in entries}
        return {name: sizes[name] for name in sorted(sizes) if name.endswith(".tar") and not name.startswith(".")}

    def size(self, name: str) -> int | None:
        """Size in bytes of the file ``name``, None where the server does not tell."""
        with self._faults("read", name):
            size = self._files.info(self.path(name)).get("size")
        return None if size is None else int(size)

    def read(self, name: str) -> bytes | None:
        """Content of the file ``name``, None if there is none."""
        with self._faults("read", name):
            try:
                return bytes(self._files.cat_file(self.path(name)))
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
            self._files.pipe_file(self.path(name), content)
        except NotImplementedError as error:
            raise PermissionError(f"{self.scheme}:// is read-only") from error
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def open(self, name: str) -> Iterator[Readable]:
        """The file ``name`` as a stream of bytes, read from front to back."""
        # Block size 0 asks web servers for one plain stream in place of many ranges.
        options = {"block_size": 0} if self.scheme in ("http", "https") else {}
        with self._faults("read", name):
            file = self._files.open(self.path(name), "rb", **options)
        try:
            yield file
        except OSError as error:
            raise ShardError(f"cannot read {self.path(name)} to its end: {' '.join(str(error).split())}") from error
        finally:
            file.close()

    @contextmanager
    def _faults(self, verb: str, name: str = "") -> Iterator[None]:
        place = self.path(name) if name else self.text
        try:
            yield
        except FileNotFoundError as error:
            what = "file" if name else "folder"
            raise ShardError(
                f"cannot {verb} {place}: there is no such {what}; check the path in data.shards"
            ) from error
        except NotADirectoryError as error:
            raise ShardError(f"cannot {verb} {place}: it is a file; name the folder that holds the shards") from error
        except Exception as error:
            raise ShardError(
                f"cannot {verb} {place}: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
