"""The ledger: one marker per finished shard. A shard is done if, and only if, its marker exists."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codec_dist.store.layout import Layout, read_layout
from codec_dist.utils import read_json, write_json_atomically


@dataclass(frozen=True)
class Marker:
    """What was written for a shard."""

    shard_number: int
    shard: str
    """File name of the shard."""
    rows: int
    """Valid rows at the front of the shard's block."""
    dropped: tuple[tuple[str, str], ...]
    """Key and reason of every sample that has no row."""
    checksums: dict[str, dict[str, str]]
    """Layer key → quantity → checksum of the valid rows' bytes."""
    identity: str
    """Identity hash of the store."""
    seconds: float
    attempt: int

    def save(self, path: Path) -> None:
        """Write the marker, whole or not at all, and flush it to disk."""
        write_json_atomically(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Marker":
        """Read a marker.

        Raises:
            OSError: there is none.
            ValueError: the file is not a marker.
        """
        values: Any = read_json(path)
        try:
            return cls(**{**values, "dropped": tuple((key, reason) for key, reason in values["dropped"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a marker: {error}") from error


class Ledger:
    """Which shards of a store are done; every call looks anew.

    Raises:
        StoreError: ``path`` is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self._layout = read_layout(path)

    def done(self) -> dict[int, Marker]:
        """Markers of the finished shards by shard number, in order.

        A marker that cannot be read, or that was written for another store, marks nothing: its shard is
        pending, and writing it again mends it.
        """
        return read_markers(self._layout)

    def pending(self) -> list[int]:
        """Numbers of the shards that are not done, in order."""
        done = self.done()
        return [number for number in range(len(self._layout.shards)) if number not in done]


def read_markers(layout: Layout) -> dict[int, Marker]:
    """See :meth:`Ledger.done`."""
    folder = layout.path / "ledger"
    # Other names are leftovers of a crash (.000003.json.….partial).
    numbers = sorted(
        int(path.stem)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"\d{6,}\.json", path.name)
    )
    markers = {number: _read_marker(layout, number) for number in numbers if number < len(layout.shards)}
    return {number: marker for number, marker in markers.items() if marker is not None}


def _read_marker(layout: Layout, number: int) -> Marker | None:
    try:
        marker = Marker.load(layout.marker_path(number))
    except (OSError, ValueError, json.JSONDecodeError):
        return None
    is_ours = (marker.shard_number, marker.identity) == (number, layout.identity_hash)
    return marker if is_ours else None
