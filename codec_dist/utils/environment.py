"""Environment variables for the length of a block."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str | None], also_restored: Sequence[str] = ()) -> Iterator[None]:
    """While open, ``values`` are in the environment; afterwards they are as before.

    Args:
        values: variables and what they are set to; None: they are not in it meanwhile.
        also_restored: variables that something inside the block may set.
    """
    before = {name: os.environ.get(name) for name in [*values, *also_restored]}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
