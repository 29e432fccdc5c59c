"""Looking for damage in a store, and forgetting what is damaged so that it is made again."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codec_dist.store.checksums import split_checksums
from codec_dist.store.chunks import ChunkFiles, group_files, metadata_problems
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import ARRAYS, GROUP, SAMPLES, Layout, read_layout
from codec_dist.store.lease import LEASE_FILES
from codec_dist.store.ledger import Marker, load_marker, marker_numbers
from codec_dist.store.place import PARTIAL
from codec_dist.store.sample_tables import finish_store, read_merged, samples_problem, shard_tables, table_problem
from codec_dist.store.storage import Place

SHOWN_PROBLEMS = 40


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store."""

    kind: str
    """``chunk``, ``samples`` (table of a shard), ``marker``, ``metadata`` (of arrays), ``table`` (of all samples),
    ``stale`` (of a process that was killed), or ``unexpected`` (no file of this store)."""
    file: str
    """The file, relative to the store."""
    found: str
    """What is wrong with it."""
    shard_number: int | None = None
    shard: str = ""
    """File name of the shard."""
    layer: str = ""
    quantity: str = ""

    @property
    def redo(self) -> bool:
        """Whether the shard must be extracted again."""
        return self.kind in ("chunk", "samples", "marker")

    @property
    def where(self) -> str:
        """Shard, layer and quantity, as far as the problem has them; else the file."""
        parts = [self.shard, self.layer, self.quantity]
        return "  ".join(part for part in parts if part) or self.file


@dataclass(frozen=True)
class Verification:
    """What a look at a store has shown."""

    location: str
    full: bool
    """Whether all was read; else only names and sizes of files were looked at."""
    shards: int
    shards_done: int
    """Shards with a marker of this store."""
    chunks: int
    """Chunks that were looked at."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Shards that are pending are not wrong."""
        return not self.problems

    @property
    def damaged(self) -> list[int]:
        """Numbers of the shards that must be extracted again, in order."""
        return sorted(
            {problem.shard_number for problem in self.problems if problem.redo and problem.shard_number is not None}
        )

    def __str__(self) -> str:
        how = "read and compared with the markers" if self.full else "looked up by name and size, not read"
        pending = self.shards - self.shards_done
        lines = [
            f"{'store':<10}{self.location}",
            f"{'shards':<10}{self.shards_done:,} of {self.shards:,} done" + (f", {pending:,} pending" * bool(pending)),
            f"{'chunks':<10}{self.chunks:,} {how}",
            f"{'problems':<10}{len(self.problems):,}" if self.problems else f"{'problems':<10}none",
        ]
        shown = self.problems[:SHOWN_PROBLEMS]
        kinds, places = max([len(f.kind) for f in shown], default=0), max([len(f.where) for f in shown], default=0)
        lines += [f"  {problem.kind:<{kinds}}  {problem.where:<{places}}  {problem.found}" for problem in shown]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  and {len(self.problems) - SHOWN_PROBLEMS:,} more")
        return "\n".join(lines + self._advice())

    def _advice(self) -> list[str]:
        if self.ok:
            return []
        advice = []
        if any(problem.kind != "unexpected" for problem in self.problems):
            advice.append(f"run `codec-dist store verify --repair {self.location}`")
        if self.damaged:
            several = "s are" if len(self.damaged) > 1 else " is"
            advice.append(f"then `codec-dist extract`: {len(self.damaged):,} shard{several} done again")
        if any(problem.kind == "unexpected" for problem in self.problems):
            advice.append("move unexpected files out of the store")
        return ["to do     " + "; ".join(advice)]


def verify_store(
    path: str | Path | Place,
    *,
    full: bool = True,
    threads: int | None = None,
    on_shard: Callable[[], None] = lambda: None,
) -> Verification:
    """Look for whatever is missing, damaged or unexpected in a store.

    Args:
        path: folder or URL of the store.
        full: read every chunk of the finished shards and compare it with its checksum. Otherwise only names and
            sizes of chunk files are looked at, which finds what is missing and what is cut short, as a power
            failure leaves it (compressed and sharded files only if they are empty). The tables of samples
            are always read.
        threads: shards that are read at once, each in pieces of one chunk; by default 2 from disk, 16 from an
            object store.
        on_shard: called after each finished shard.

    Raises:
        StoreError: ``path`` is not a store, or cannot be reached.
    """
    layout = read_layout(path)
    look = _Look(layout, full)
    metadata = list(look.metadata())
    with ThreadPoolExecutor(threads or (2 if layout.place.is_local else 16)) as pool:

        def of_shard(item: tuple[int, Marker]) -> list[Problem]:
            found = list(look.shard(*item))
            on_shard()
            return found

        by_shard = [problem for found in pool.map(of_shard, look.markers.items()) for problem in found]
    problems = (*metadata, *look.bad_markers, *by_shard, *look.merged_table(by_shard), *look.unknown_files())
    chunks = sum(layout.parts(marker.rows) for marker in look.markers.values())
    arrays = len(layout.layers) * len(layout.quantities)
    return Verification(str(layout.place), full, len(layout.shards), len(look.markers), chunks * arrays, problems)


def repair_store(path: str | Path | Place, found: Verification) -> list[int]:
    """Make a store such that ``extract`` completes it: forget the markers of damaged shards, remove stale files.

    Metadata of arrays are written again, the table of all samples is removed where it is wrong or a shard is
    forgotten, and made again if all shards are done. Unexpected files stay. Hold the store's lease.

    Returns:
        Numbers of the shards that are to be extracted again.

    Raises:
        StoreError: the disk refuses.
    """
    layout = read_layout(path)
    place = layout.place
    expected = group_files(layout)
    try:
        for number in found.damaged:
            # A reader that opens the store now must not see a finished table over a shard that is not.
            place.delete(SAMPLES)
            place.delete(layout.marker_file(number))
        for problem in found.problems:
            if problem.kind == "stale" or problem.kind == "table":
                place.delete(problem.file)
            elif problem.kind == "metadata":
                place.write(problem.file, expected[problem.file.removeprefix(f"{ARRAYS}/")])
    except OSError as error:
        raise StoreError(f"cannot repair {place}: {error.strerror or error}") from error
    if any(problem.kind == "table" for problem in found.problems):
        with suppress(StoreError):  # shards are pending: whoever completes them makes the table
            finish_store(place)
    return found.damaged


class _Look:
    """One look at the files of a store."""

    def __init__(self, layout: Layout, full: bool) -> None:
        self._layout, self._full = layout, full
        self._chunks = ChunkFiles(layout)
        self._files = layout.place.files()
        self._arrays = [(layer, quantity) for layer in layout.layers for quantity in layout.quantities]
        self._metadata = {f"{ARRAYS}/{name}": content for name, content in group_files(layout).items()}
        self.bad_markers: list[Problem] = []
        self.markers: dict[int, Marker] = {}
        numbers = sorted(number for number in marker_numbers(layout) if number < len(layout.shards))
        for number, marker in zip(numbers, layout.place.map(lambda number: load_marker(layout, number), numbers)):
            if isinstance(marker, Marker):
                self.markers[number] = marker
            else:
                self.bad_markers.append(self._of_shard("marker", layout.marker_file(number), marker, number))
        if SAMPLES in self._files:
            # The store was complete, so a marker that is not there was lost.
            self.bad_markers += [
                self._of_shard("marker", layout.marker_file(number), "is missing in a finished store", number)
                for number in sorted(set(range(len(layout.shards))) - set(numbers))
            ]

    def metadata(self) -> Iterator[Problem]:
        """Problems of the metadata of arrays and groups; the main group's have been read already."""
        place = self._layout.place
        names = [name for name in self._metadata if name != GROUP]
        contents = place.map(lambda name: place.read(name) if name in self._files else None, names)
        for name, content in zip(names, contents):
            wrong = metadata_problems(self._metadata[name], content)
            if wrong is not None:
                yield Problem("metadata", name, wrong)

    def shard(self, number: int, marker: Marker) -> Iterator[Problem]:
        """Problems of a finished shard."""
        layout = self._layout
        wrong = samples_problem(layout, number, marker)
        if wrong is not None:
            yield self._of_shard("samples", layout.samples_file(number), wrong, number)
        for layer, quantity in self._arrays:
            names = [layout.chunk_file(layer, quantity, number, part) for part in layout.file_parts()]
            problems = {name: wrong for name in names if (wrong := self._file_problem(name, layer)) is not None}
            if self._full and not problems:
                problems = dict(self._content_problems(marker, layer, quantity))
            for name, wrong in problems.items():
                yield self._of_shard("chunk", name, wrong, number, layer, quantity)

    def merged_table(self, problems: list[Problem]) -> Iterator[Problem]:
        """The problem of the table of all samples, if it has one."""
        if SAMPLES not in self._files or any(problem.kind == "samples" for problem in problems):
            return
        try:
            merged = read_merged(self._layout)
        except StoreError as error:
            yield Problem("table", SAMPLES, str(error).partition(";")[0])
            return
        wrong = table_problem(self._layout, self.markers, merged)
        if wrong is not None or not self._full:
            yield from [Problem("table", SAMPLES, wrong)] if wrong is not None else []
            return
        start = 0
        for table in shard_tables(self._layout, self.markers):
            if not merged.slice(start, len(table)).equals(table):
                yield Problem("table", SAMPLES, f"differs from the tables of the shards from row {start:,}")
                return
            start += len(table)

    def unknown_files(self) -> Iterator[Problem]:
        """Stale files, and files that are none of this store's."""
        layout = self._layout
        folders = {layout.array_folder(*array) for array in self._arrays}
        per_block = len(layout.file_parts())
        known = {SAMPLES, *self._metadata}
        for name in sorted(self._files):
            folder, _, base = name.rpartition("/")
            chunk = re.fullmatch(r"c\.(0|[1-9]\d*)\.0", base)
            if any(part.endswith(PARTIAL) for part in name.split("/")):
                yield Problem("stale", name, "was being written when a process was killed (or is now)")
            elif chunk is not None and folder in folders:
                if int(chunk[1]) >= len(layout.shards) * per_block:
                    yield Problem("unexpected", name, f"the store has {len(layout.shards):,} shards")
            elif folder in ("ledger", "samples") and self._is_numbered(name):
                continue
            elif name not in known and not re.fullmatch(LEASE_FILES, name):
                yield Problem("unexpected", name, "is no file of this store")

    def _is_numbered(self, name: str) -> bool:
        number = name.rpartition("/")[2].partition(".")[0]
        if not number.isdecimal() or int(number) >= len(self._layout.shards):
            return False
        return name in (self._layout.marker_file(int(number)), self._layout.samples_file(int(number)))

    def _file_problem(self, name: str, layer: str) -> str | None:
        """What name and size tell of a chunk's file."""
        layout = self._layout
        size = self._files.get(name)
        if size is None:
            return "is missing"
        if layout.compression != "none" or layout.sharding:
            return None if size else "is empty"
        expected = layout.chunk_rows * layout.layers[layer] * np.dtype(layout.dtype).itemsize
        return None if size == expected else f"has {size:,} of {expected:,} bytes"

    def _content_problems(self, marker: Marker, layer: str, quantity: str) -> Iterator[tuple[str, str]]:
        for part in range(self._layout.parts(marker.rows)):
            wrong = self._chunks.problem(marker, layer, quantity, part)
            if wrong is not None:
                name = self._layout.chunk_file(layer, quantity, marker.shard_number, part)
                yield name, wrong.text + self._owner_of(wrong.checksum, layer, quantity)

    def _owner_of(self, checksum: str | None, layer: str, quantity: str) -> str:
        """Whose rows a chunk holds that is not this shard's, where a marker tells."""
        for marker in self.markers.values():
            if checksum in split_checksums(marker.checksums.get(layer, {}).get(quantity)):
                return f", they are the rows of {marker.shard}"
        return ""

    def _of_shard(self, kind: str, file: str, found: str, number: int, layer: str = "", quantity: str = "") -> Problem:
        return Problem(kind, file, found, number, self._layout.shards[number][0], layer, quantity)
