"""metrics.jsonl: one JSON object per line, only ever appended, each line written whole."""

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from codec_dist.tracking.errors import TrackingError
from codec_dist.utils import naming_full_disk, without_credentials


class MetricsJournal:
    """Appends whole lines to a JSONL file; usable as a context manager.

    A line that an earlier writer left unfinished (a crash in the middle of a write) is closed first, so
    that it damages no later line.

    Raises:
        TrackingError: the file cannot be created or opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            with naming_full_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise TrackingError(f"cannot write metrics to {path}: {error.strerror or error}") from error
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._append(b"\n")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append ``entry`` as one line, with the time in front; NaN and infinities become null.

        Raises:
            TrackingError: the journal is closed.
            DiskFullError: the disk is full.
            TypeError: the entry holds something that JSON cannot.
        """
        line = json.dumps(finite({"time": round(time.time(), 3), **entry}), ensure_ascii=False, allow_nan=False)
        self._append(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._descriptor is None:
                raise TrackingError(f"cannot write metrics to {self.path}: it is closed already")
            try:
                with naming_full_disk(self.path):
                    while line:
                        line = line[os.write(self._descriptor, line) :]
            except OSError as error:
                raise TrackingError(f"cannot write metrics to {self.path}: {error.strerror or error}") from error


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a metrics.jsonl in order; lines that a crash left unfinished are passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                yield entry


def finite(value: Any) -> Any:
    """A copy of nested plain values in which NumPy and torch scalars are plain, NaN and infinities null, URLs clean.

    All that is logged passes here: credentials in URLs are taken out.
    """
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, Path | str):
        return without_credentials(str(value))
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
