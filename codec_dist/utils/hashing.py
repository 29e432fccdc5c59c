"""Hashes that are the same on every machine and in every process, and seeds that are derived by them."""

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


# ---- Seeds for independent streams of random numbers, derived from one


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of ``parts``, e.g. ``derive_seed(run_seed, "split")``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
