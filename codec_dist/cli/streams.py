"""The terminal as a border: what is written there holds no credentials."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from codec_dist.utils import without_credentials


class _Clean:
    """A text stream that takes credentials out of URLs; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_credentials(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def clean_streams() -> Iterator[None]:
    """While open, standard output and standard error take credentials out of what is written."""
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Clean(before[0]), _Clean(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
