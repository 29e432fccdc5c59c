"""The ledger: one marker per finished shard. A shard is done if, and only if, its marker exists."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from codec_dist.store.checksums import METHOD
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import Layout, read_layout
from codec_dist.store.storage import Place
from codec_dist.utils import hash_json

CHECKSUM = re.compile(r"[0-9a-f]{8}")
# Of a shard's time and attempts no more is expected than that they are numbers which can be added up.
LARGEST_SECONDS, LARGEST_ATTEMPT = 1e12, 2**31


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
    def parse(cls, content: bytes, layout: Layout, number: int) -> "Marker":
        """The marker of a shard in a file's bytes.

        Raises:
            ValueError: they are no marker, or not all as they were written, or a field is not what this shard of
                this store can have.
        """
        try:
            values: Any = json.loads(content)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError(f"it is not a marker but {_shown(values)}")
        stated = values.pop("checksum", None)
        wrong = next(_wrong_fields(values, layout, number), None)
        if wrong is not None:
            raise ValueError(wrong)
        if hash_json(values) != stated:
            raise ValueError("its checksum is another: it was changed after it was written")
        return cls(**{**values, "dropped": tuple((key, reason) for key, reason in values["dropped"])})


def _wrong_fields(values: dict[str, Any], layout: Layout, number: int) -> Iterator[str]:
    """What is wrong with the fields of a marker; later fields are looked at only where earlier ones are right."""
    names = {field.name for field in fields(Marker)}
    if values.keys() != names:
        missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
        yield f"it lacks {', '.join(missing)}" if missing else f"its field {_shown(unknown[0])} is unknown"
        return
    shard, samples = layout.shards[number]
    if values["identity"] != layout.identity_hash:
        yield f"it was written for a store of another identity ({_shown(values['identity'])})"
    if not _is_whole(values["shard_number"], number, number) or values["shard"] != shard:
        yield f"it is that of shard {_shown(values['shard_number'])}, {_shown(values['shard'])}"
    dropped = values["dropped"]
    if not isinstance(dropped, list) or not all(_is_pair_of_texts(each) for each in dropped):
        yield "dropped is not a list of keys and reasons"
        return
    if not _is_whole(values["rows"], 0, samples) or values["rows"] + len(dropped) != samples:
        yield f"rows is {_shown(values['rows'])}, and {len(dropped)} of the shard's {samples} samples were dropped"
        return
    yield from _wrong_checksums(values["checksums"], layout, layout.parts(values["rows"]))
    if not _is_checksums(values["samples"], 1):
        yield f"samples is {_shown(values['samples'])}, not a checksum"
    seconds = values["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LARGEST_SECONDS:
        yield f"seconds is {_shown(seconds)}"
    if not _is_whole(values["attempt"], 1, LARGEST_ATTEMPT):
        yield f"attempt is {_shown(values['attempt'])}"


def _wrong_checksums(checksums: Any, layout: Layout, chunks: int) -> Iterator[str]:
    """What is wrong with the checksums of a block: each array of the store has one for each of its ``chunks``."""
    if not isinstance(checksums, dict) or checksums.keys() != layout.layers.keys():
        yield "checksums are not those of the store's layers"
        return
    for layer, found in checksums.items():
        if not isinstance(found, dict) or found.keys() != layout.quantities.keys():
            yield f"checksums of layer {layer} are not those of the store's quantities"
        elif wrong := [quantity for quantity, text in found.items() if not _is_checksums(text, chunks)]:
            yield f"checksums of {layer}, {wrong[0]} are {_shown(found[wrong[0]])}, not {chunks} checksums"


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _is_checksums(value: Any, count: int) -> bool:
    """Whether this is what ``join_checksums`` makes of ``count`` checksums."""
    if not isinstance(value, str) or not value.startswith(f"{METHOD}:"):
        return False
    parts = value.removeprefix(f"{METHOD}:").split(",") if count else []
    return (len(parts), value == f"{METHOD}:") == (count, not count) and all(map(CHECKSUM.fullmatch, parts))


def _shown(value: Any) -> str:
    """A value from a damaged file, short and printable."""
    text = ascii(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


class Ledger:
    """Which shards of a store are done; every call looks again.

    Raises:
        StoreError: ``path`` is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self._layout = read_layout(path)

    def done(self) -> dict[int, Marker]:
        """Markers of the finished shards by shard number, in order.

        A marker that cannot be read, or that was written for another store, marks nothing: its shard is
        pending, and writing it again repairs it.
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
    # Other names are stale files of a crash (.000003.json.….partial).
    matches = (re.fullmatch(r"ledger/(\d{6,})\.json", name) for name in layout.place.files("ledger"))
    return [int(match[1]) for match in matches if match]


def load_marker(layout: Layout, number: int) -> "Marker | str":
    """The marker of a shard, or why its file is none of this store's.

    Raises:
        StoreError: the store cannot be reached.
    """
    try:
        return Marker.parse(layout.place.read(layout.marker_file(number)), layout, number)
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"is damaged: {' '.join(str(error).split())}"
    except OSError as error:
        raise StoreError(f"cannot read the ledger of {layout.place}: {' '.join(str(error).split())}") from error
