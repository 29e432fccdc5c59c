"""Tables of samples: one per shard, and all in one when the store is complete."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.store.errors import StoreError
from codec_dist.store.layout import SAMPLES, Layout, read_layout
from codec_dist.store.ledger import Marker, read_markers

REQUIRED = {
    "key": pa.string(),
    "label": pa.int32(),
    "prediction": pa.int32(),
    "target_value": pa.float64(),
    "baseline_value": pa.float64(),
}
ADDED = ("shard", "row")
ROWS_PER_GROUP = 65_536


def finish_store(path: str | Path) -> None:
    """Write ``samples.parquet``, the samples of all shards in the order of shard number and position.

    Memory: one row group, whatever the size of the store.

    Raises:
        StoreError: shards are pending, or their tables do not fit together.
    """
    layout = read_layout(path)
    markers = read_markers(layout)
    pending = [name for number, (name, _) in enumerate(layout.shards) if number not in markers]
    if pending:
        raise StoreError(
            f"the store {layout.path} is not complete: {len(pending)} of {len(layout.shards)} shards are pending, "
            f"first {pending[0]}; run `codec-dist extract` again"
        )
    temporary = layout.path / f".{SAMPLES}.partial"
    _write_all(temporary, _shard_tables(layout, markers))
    os.replace(temporary, layout.path / SAMPLES)


def read_samples(layout: Layout, markers: dict[int, Marker]) -> pa.Table:
    """Samples of the shards in ``markers``, in order."""
    merged = layout.path / SAMPLES
    if len(markers) == len(layout.shards) and merged.exists():
        table = _read_table(merged)
        if len(table) == sum(marker.rows for marker in markers.values()):
            return table
    tables = list(_shard_tables(layout, markers))
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
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _check_keys(shard: str, keys: list[str | None]) -> None:
    for key, count in Counter(keys).items():
        if key is None or count > 1:
            raise StoreError(f"the samples of shard {shard} need keys, each once: {key!r} is missing or repeated")


def _shard_tables(layout: Layout, markers: dict[int, Marker]) -> Iterator[pa.Table]:
    schema = None
    for number, marker in markers.items():
        table = _read_table(layout.samples_path(number))
        if len(table) != marker.rows:
            raise StoreError(
                f"{layout.samples_path(number)} has {len(table)} rows where the marker says {marker.rows}: "
                f"remove {layout.marker_path(number)} and run `codec-dist extract` again"
            )
        schema = schema or table.schema
        if table.schema != schema:
            raise StoreError(f"{layout.samples_path(number)} has other columns than the shards before it: extract anew")
        yield table


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"cannot read {path}: {' '.join(str(error).split())}; remove the shard's marker and extract it again"
        ) from error


def _write_all(path: Path, tables: Iterable[pa.Table]) -> None:
    writer, waiting = None, []
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            waiting.append(table)
            if sum(map(len, waiting)) >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _empty_table() -> pa.Table:
    schema = pa.schema([("shard", pa.string()), *REQUIRED.items(), ("row", pa.int64())])
    return schema.empty_table()
