"""Environment variables for the length of a block."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def environment(values: Mapping[str, str], also_restored: Sequence[str] = ()) -> Iterator[None]:
    """While open, ``values`` are in the environment; afterwards they are as before.

    Args:
        values: variables and what they are set to.
        also_restored: variables that something inside the block may set.
    """
    before = {name: os.environ.get(name) for name in [*values, *also_restored]}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
