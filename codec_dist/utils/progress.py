"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A bar with a rate on a terminal; at most one plain line every five seconds elsewhere.

    Use as a context manager::

        with Progress("extract", total=1797, unit="images") as progress:
            progress.advance(64, note="shard 3")
    """

    def __init__(
        self, description: str, total: int, unit: str = "items", *, done: int = 0, stream: TextIO | None = None
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._initial = self._done = done
        self._stream = stream or sys.stderr
        self._note = ""
        self._started = self._last_line = time.monotonic()
        self._told = False
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=description, total=total, unit=f" {unit}", initial=done, file=self._stream)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more as done; ``note`` is shown at the end of the line."""
        self._done += count
        self._note = note
        self._told = False
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def say(self, line: str) -> None:
        """Print a line above the bar, or among the lines."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and not self._told:
            self._line()

    def _line(self) -> None:
        self._told = True
        self._last_line = time.monotonic()
        rate = (self._done - self._initial) / max(self._last_line - self._started, 1e-9)
        note = f", {self._note}" if self._note else ""
        speed = f"{rate:,.1f} per second" if rate >= 1 else f"{60 * rate:,.1f} per minute"
        line = f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, {speed}{note}"
        print(line, file=self._stream, flush=True)
