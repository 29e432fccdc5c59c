"""A small disk for tests of what happens when one is full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A folder that is a disk of its own of this ``size`` (``64k``, ``100m``) for the length of a block.

    The test is skipped where a disk cannot be made, which needs the rights of root.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        refused = subprocess.run(mounting, capture_output=True).returncode != 0
    except FileNotFoundError:
        refused = True
    if refused:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
