"""Hashes that are the same on every machine and in every process."""

import hashlib
import json
from pathlib import Path
from typing import Any


def hash_json(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON value, independent of the order of keys.

    Raises:
        TypeError: the value holds something that JSON cannot.
        ValueError: the value holds a NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
