"""A store in an object store (S3, Google Cloud Storage) through fsspec, patient with servers that are busy."""

import errno
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any, TypeVar

import fsspec
import numpy as np

from codec_dist.store.errors import StoreError
from codec_dist.store.storage import Item, Place, Result

Value = TypeVar("Value")

# Each scheme and the package that fsspec needs for it.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}

# Requests are made again here alone: the packages' own ways, one within the other, multiply to minutes for a request.
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}

# How long a server that is busy, or has answered before, may fail until work is given up; and one that was never
# reached, whose address may be wrong.
PATIENCE_SECONDS = 300.0
FIRST_PATIENCE_SECONDS = 15.0
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0

# Answers that asking again does not change.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
FINAL_NAMES = ("NoCredentialsError", "ParamValidationError", "ProfileNotFound", "InvalidRegionError")

# What a server that is there says when it cannot serve now, as an error's `errno` (s3fs) or `code` (gcsfs).
BUSY = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO), 429, 500, 502, 503, 504)

# What a server says when there is no room, which only people can make: MinIO's and Ceph's words.
FULL = ("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded")

# What s3fs and gcsfs tell of an object that differs between two that were put under one name.
VERSION_FACTS = ("ETag", "etag", "generation", "LastModified", "updated", "size")

REQUESTS_AT_ONCE = 16


class ObjectPlace(Place):
    """A prefix of a bucket. An object is put as a whole, so no reader sees a part of it.

    Credentials and endpoint come from the environment, as the scheme's package reads them
    (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ...).

    Raises:
        StoreError: another scheme, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        self.text = f"{scheme.lower()}://{rest.strip('/')}"
        if scheme.lower() not in PACKAGES:
            schemes = ", ".join(f"{known}://" for known in PACKAGES)
            raise StoreError(f"cannot open {url}: stores are in local folders or at {schemes}; choose one of these")
        if not rest.strip("/"):
            raise StoreError(f"cannot open {url}: name a bucket and a prefix, such as {scheme}://bucket/run/store")
        self._scheme, self._root = scheme.lower(), rest.strip("/")
        self._connection: Any = None
        self._process = 0
        self._answered = False
        try:
            _ = self._objects
        except ImportError as error:
            package = PACKAGES[self._scheme]
            raise StoreError(f"the store {url} needs the package {package}: pip install {package}") from error

    @property
    def _objects(self) -> Any:
        """The connection of this process: one from before a fork waits for a thread that is not there."""
        if self._process != os.getpid():
            options = OPTIONS.get(self._scheme, {})
            self._connection = fsspec.filesystem(self._scheme, use_listings_cache=False, **options)
            if self._scheme == "s3":
                self._connection.retries = 1
            self._process = os.getpid()
        return self._connection

    @property
    def is_local(self) -> bool:
        return False

    @property
    def patience(self) -> float:
        return PATIENCE_SECONDS

    def is_folder(self) -> bool:
        return bool(self._ask(lambda: self._objects.exists(self._root)))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return bytes(self._ask(lambda: self._objects.cat_file(self._at(name), start=start or None, end=stop)))

    def read_into(self, name: str, target: np.ndarray, each: Callable[[np.ndarray], None]) -> int:
        content = np.frombuffer(self.read(name, 0, target.nbytes) if target.nbytes else b"", np.uint8)
        target.reshape(-1).view(np.uint8)[: len(content)] = content
        each(content)
        return len(content)

    def write(self, name: str, content: bytes) -> None:
        self._ask(lambda: self._objects.pipe_file(self._at(name), content))

    def write_from(self, name: str, source: np.ndarray, size: int) -> None:
        self.write(name, source.tobytes().ljust(size, b"\0"))

    def create(self, name: str, content: bytes) -> bool:
        try:
            self._ask(lambda: self._objects.pipe_file(self._at(name), content, mode="create"))
        except FileExistsError:
            # An answer that was lost on its way is asked for again, and then our own object is in the way.
            return self.read(name) == content
        return True

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            self._ask(lambda: self._objects.put_file(file.name, self._at(name)))

    def delete(self, name: str) -> None:
        for each in {name, *self.files(name)}:
            with suppress(FileNotFoundError):
                self._ask(lambda each=each: self._objects.rm_file(self._at(each)))  # type: ignore[misc]

    def size(self, name: str) -> int | None:
        try:
            return int(self._ask(lambda: self._objects.info(self._at(name)))["size"])
        except FileNotFoundError:
            return None

    def version(self, name: str) -> str | None:
        try:
            facts = self._ask(lambda: self._objects.info(self._at(name)))
        except FileNotFoundError:
            return None
        return " ".join(str(facts[each]) for each in VERSION_FACTS if each in facts)

    def files(self, folder: str = "") -> dict[str, int]:
        found: dict[str, Any] = self._ask(lambda: self._objects.find(f"{self._at(folder)}/", detail=True))
        start = len(self._root) + 1
        return {name[start:]: int(facts["size"]) for name, facts in found.items() if facts["type"] == "file"}

    def age(self, name: str) -> float | None:
        probe = f"{name}.{random.getrandbits(64):x}.partial"
        self.write(probe, b"probe")
        try:
            now = self._ask(lambda: self._objects.modified(self._at(probe)))
            then = self._ask(lambda: self._objects.modified(self._at(name)))
        except FileNotFoundError:
            return None
        finally:
            self.delete(probe)
        return float((now - then).total_seconds())

    def touch(self, name: str, content: bytes) -> None:
        self.write(name, content)

    def publish(self, folder: str, files: Mapping[str, bytes], first: str) -> None:
        self.create(f"{folder}/{first}", files[first])

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(function, items))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, request: Callable[[], Value]) -> Value:
        """The answer to a request, which is made again while the server is busy or away."""
        started, delay = time.monotonic(), FIRST_DELAY_SECONDS
        while True:
            try:
                answer = request()
            except Exception as error:
                if (full := _code(error)) in FULL:
                    raise OSError(errno.ENOSPC, f"no space left ({full})") from error
                if isinstance(error, FINAL):
                    self._answered = True
                    raise
                words = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if type(error).__name__ in FINAL_NAMES:
                    raise PermissionError(f"{self.text} cannot be used: {words}") from error
                if getattr(error, "errno", None) in BUSY or getattr(error, "code", None) in BUSY:
                    self._answered = True
                patience = PATIENCE_SECONDS if self._answered else FIRST_PATIENCE_SECONDS
                if time.monotonic() - started + delay > patience:
                    raise OSError(f"{self.text} does not answer: {words}") from error
                # Many actors learn at once that the server is busy; they should not all come back at once.
                time.sleep(delay * random.uniform(0.5, 1))
                delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            else:
                self._answered = True
                return answer


def _code(error: BaseException) -> str:
    """The code that the server gave in its answer, of which s3fs makes another error; empty if there is none."""
    response = getattr(error.__cause__ or error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
