"""The ledger: one marker per finished shard. A shard is done if, and only if, its marker exists."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codec_dist.store.errors import StoreError
from codec_dist.store.layout import Layout, read_layout
from codec_dist.store.place import Place
from codec_dist.utils import hash_json


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
    """Layer key → quantity → checksums of the valid rows of its chunks."""
    samples: str
    """Checksum of the file of the shard's samples."""
    identity: str
    """Identity hash of the store."""
    seconds: float
    attempt: int

    def save(self, place: Place, name: str) -> None:
        """Write the marker, whole or not at all."""
        values = asdict(self)
        text = json.dumps(values | {"checksum": hash_json(values)}, indent=2, ensure_ascii=False)
        place.write(name, (text + "\n").encode())

    @classmethod
    def parse(cls, content: bytes) -> "Marker":
        """The marker in a file's bytes.

        Raises:
            ValueError: they are no marker, or not all as they were written.
        """
        try:
            values: Any = json.loads(content)
            stated = values.pop("checksum")
            if hash_json(values) != stated:
                raise ValueError("its checksum is another: it was changed after it was written")
            return cls(**{**values, "dropped": tuple((key, reason) for key, reason in values["dropped"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"it is not a marker: {error}") from error


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

    def __len__(self) -> int:
        """Number of markers; they are counted, not read."""
        return len(marker_numbers(self._layout))

    def pending(self) -> list[int]:
        """Numbers of the shards that are not done, in order."""
        done = self.done()
        return [number for number in range(len(self._layout.shards)) if number not in done]


def read_markers(layout: Layout) -> dict[int, Marker]:
    """See :meth:`Ledger.done`."""
    numbers = sorted(number for number in marker_numbers(layout) if number < len(layout.shards))
    markers = layout.place.map(lambda number: load_marker(layout, number), numbers)
    return {number: marker for number, marker in zip(numbers, markers) if isinstance(marker, Marker)}


def marker_numbers(layout: Layout) -> list[int]:
    """Numbers of all files in the ledger that are named like markers."""
    # Other names are leftovers of a crash (.000003.json.….partial).
    matches = (re.fullmatch(r"ledger/(\d{6,})\.json", name) for name in layout.place.files("ledger"))
    return [int(match[1]) for match in matches if match]


def load_marker(layout: Layout, number: int) -> "Marker | str":
    """The marker of a shard, or why its file is none of this store's.

    Raises:
        StoreError: the store cannot be reached.
    """
    try:
        marker = Marker.parse(layout.place.read(layout.marker_file(number)))
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"is damaged: {' '.join(str(error).split())}"
    except OSError as error:
        raise StoreError(f"cannot read the ledger of {layout.place}: {' '.join(str(error).split())}") from error
    if marker.identity != layout.identity_hash:
        return f"was written for a store of another identity ({marker.identity[:16]})"
    if marker.shard_number != number:
        return f"is that of shard {marker.shard_number}"
    return marker
