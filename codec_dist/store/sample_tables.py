"""Tables of samples: one per shard, and all in one when the store is complete."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.store.checksums import checksum, join_checksums
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import SAMPLES, Layout, read_layout
from codec_dist.store.ledger import Marker, read_markers
from codec_dist.store.storage import Place
from codec_dist.utils import naming_full_disk

REQUIRED = {
    "key": pa.string(),
    "label": pa.int32(),
    "prediction": pa.int32(),
    "target_value": pa.float64(),
    "baseline_value": pa.float64(),
}
ADDED = ("shard", "row")
ROWS_PER_GROUP = 65_536
TABLES_AT_ONCE = 64
_MEND = "run `codec-dist store verify --repair`, then `codec-dist extract` again"


def finish_store(path: str | Path | Place) -> None:
    """Write ``samples.parquet``, the samples of all shards in the order of shard number and position.

    Memory: one row group, whatever the size of the store.

    Raises:
        StoreError: shards are pending, their tables do not fit together, or the disk refuses.
    """
    layout = read_layout(path)
    markers = read_markers(layout)
    pending = [name for number, (name, _) in enumerate(layout.shards) if number not in markers]
    if pending:
        raise StoreError(
            f"the store {layout.place} is not complete: {len(pending)} of {len(layout.shards)} shards are pending, "
            f"first {pending[0]}; run `codec-dist extract` again"
        )
    try:
        with naming_full_disk(f"{layout.place}/{SAMPLES}"), layout.place.writing(SAMPLES) as file:
            _write_all(file, shard_tables(layout, markers))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise StoreError(f"cannot write {layout.place}/{SAMPLES}: {reason}") from error


def read_samples(layout: Layout, markers: dict[int, Marker]) -> pa.Table:
    """Samples of the shards in ``markers``, in order."""
    if len(markers) == len(layout.shards) and layout.place.size(SAMPLES) is not None:
        table = read_merged(layout)
        if table_problem(layout, markers, table) is None:
            return table
    tables = list(shard_tables(layout, markers))
    return pa.concat_tables(tables) if tables else _empty_table()


def prepare_samples(layout: Layout, number: int, samples: pa.Table, dropped: Sequence[tuple[str, str]]) -> pa.Table:
    """The table of a shard's samples in the stored form: shard, the required columns, row, and the others.

    Raises:
        StoreError: a column is missing or of another kind, keys are missing or repeated, a label is
            negative, or rows and dropped samples are not all of the shard.
    """
    shard, expected = layout.shards[number]
    missing = [name for name in REQUIRED if name not in samples.column_names]
    if missing:
        raise StoreError(f"the samples of shard {shard} have no column {missing[0]!r}: expected {', '.join(REQUIRED)}")
    if reserved := [name for name in ADDED if name in samples.column_names]:
        raise StoreError(f"the samples of shard {shard} have a column {reserved[0]!r}: the store adds it, leave it out")
    if len(samples) + len(dropped) != expected:
        raise StoreError(
            f"shard {shard} has {expected} samples: {len(samples)} rows and {len(dropped)} dropped samples were given"
        )
    columns: dict[str, Any] = {"shard": pa.array([shard] * len(samples), pa.string())}
    for name, kind in REQUIRED.items():
        try:
            columns[name] = samples[name].cast(kind)
        except pa.ArrowException as error:
            raise StoreError(
                f"the column {name!r} of shard {shard}'s samples is not of type {kind}: {error}"
            ) from error
    _check_keys(shard, columns["key"].to_pylist() + [key for key, _ in dropped])
    label = pc.min(columns["label"]).as_py()
    if label is not None and label < 0:
        raise StoreError(f"a sample of shard {shard} has the label {label}: give null for samples without label")
    start = layout.block_start(number)
    columns["row"] = pa.array(range(start, start + len(samples)), pa.int64())
    columns |= {name: samples[name] for name in samples.column_names if name not in columns}
    return pa.table(columns)


def serialise_samples(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    # Dictionaries of keys and numbers cost time and make the file larger.
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=["shard"], write_statistics=False, write_page_checksum=True
    )
    return bytes(sink.getvalue().to_pybytes())


def _check_keys(shard: str, keys: list[str | None]) -> None:
    if None not in (distinct := set(keys)) and len(distinct) == len(keys):
        return
    for key, count in Counter(keys).items():
        if key is None or count > 1:
            raise StoreError(f"the samples of shard {shard} need keys, each once: {key!r} is missing or repeated")


def shard_tables(layout: Layout, markers: dict[int, Marker]) -> Iterator[pa.Table]:
    """The tables of the shards in ``markers``, in order.

    Raises:
        StoreError: a table is lost, damaged or of other columns.
    """
    schema = None
    items = list(markers.items())
    for start in range(0, len(items), TABLES_AT_ONCE):
        group = items[start : start + TABLES_AT_ONCE]
        for (number, _), table in zip(group, layout.place.map(lambda item: _shard_table(layout, *item), group)):
            schema = schema or table.schema
            if table.schema != schema:
                name = layout.samples_file(number)
                raise StoreError(f"{layout.place}/{name} has other columns than the shards before it: extract again")
            yield table


def samples_problem(layout: Layout, number: int, marker: Marker) -> str | None:
    """What is wrong with the table of a finished shard, None if nothing is."""
    found = _read_checked(layout, number, marker)
    return found if isinstance(found, str) else None


def read_merged(layout: Layout) -> pa.Table:
    """``samples.parquet``.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return _parse(layout.place.read(SAMPLES))
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot read {layout.place}/{SAMPLES}: {' '.join(str(error).split())}; {_MEND}") from error


def _shard_table(layout: Layout, number: int, marker: Marker) -> pa.Table:
    found = _read_checked(layout, number, marker)
    if isinstance(found, str):
        raise StoreError(f"the samples of shard {marker.shard} in {layout.place} are damaged: {found}; {_MEND}")
    return found


def _read_checked(layout: Layout, number: int, marker: Marker) -> pa.Table | str:
    """A shard's table, or why there is none that can be trusted."""
    name = layout.samples_file(number)
    try:
        content = layout.place.read(name)
        found = join_checksums([checksum(content)])
        if found != marker.samples:
            return f"found {found} in {name}, the marker says {marker.samples}"
        table = _parse(content)
        return table_problem(layout, {number: marker}, table) or table
    except FileNotFoundError:
        return f"found no file {name}"
    except (OSError, pa.ArrowException) as error:
        return f"cannot read {name}: {' '.join(str(error).split())}"


def table_problem(layout: Layout, markers: dict[int, Marker], table: pa.Table) -> str | None:
    """What is wrong with the columns or rows of a table of the samples of these shards; None: nothing."""
    expected = {"shard": pa.string(), **REQUIRED, "row": pa.int64()}
    for name, kind in expected.items():
        found = [table.schema.field(place).type for place in table.schema.get_all_field_indices(name)]
        if found != [kind]:
            return f"its column {name!r} is {' and '.join(map(str, found)) or 'missing'}, expected {kind}"
    rows = [marker.rows for marker in markers.values()]
    if len(table) != sum(rows):
        return f"has {len(table):,} rows where the markers have {sum(rows):,}"
    starts = [layout.block_start(number) for number in markers]
    places = np.concatenate([start + np.arange(count) for start, count in zip(starts, rows)] or [np.arange(0)])
    if table["row"].null_count or not np.array_equal(table["row"].to_numpy(), places):
        return "its row numbers are not those of the shards' blocks"
    names = pa.array([marker.shard for marker in markers.values()], pa.string())
    shards = names.take(pa.array(np.repeat(np.arange(len(rows)), rows)))
    if not table["shard"].equals(pa.chunked_array([shards])) or table["key"].null_count:
        return "its shards or keys are not those of the markers"
    return None


def _parse(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content), page_checksum_verification=True)


def _write_all(file: IO[bytes], tables: Iterable[pa.Table]) -> None:
    writer, waiting = None, []
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True)
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()


def _empty_table() -> pa.Table:
    schema = pa.schema([("shard", pa.string()), *REQUIRED.items(), ("row", pa.int64())])
    return schema.empty_table()
