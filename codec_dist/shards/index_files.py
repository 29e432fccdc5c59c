"""The two files of an index: ``index.parquet`` and ``index-samples.parquet``; with a pattern, ``index-HASH...``."""

import shlex
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.shards.errors import ShardError
from codec_dist.shards.location import Location
from codec_dist.shards.scanning import ShardInfo

FORMAT_VERSION = "1"
SHARDS_SCHEMA = pa.schema(
    [("name", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("fingerprint", pa.string())]
)
# Only where there are faults: most data sets have none.
FAULTS = pa.field("faults", pa.list_(pa.struct([("position", pa.int32()), ("reason", pa.string())])))


def write_tables(
    place: Location, stem: str, shards: Sequence[ShardInfo], samples: pa.Table, metadata: dict[str, str]
) -> None:
    """Write both files of the index ``stem``, each whole or not at all; the one that readers look for comes last.

    Raises:
        OSError: the place is read-only or full.
    """
    metadata = {"format": FORMAT_VERSION} | metadata
    schema, rows = SHARDS_SCHEMA, [_row(shard) for shard in shards]
    if any(shard.faults for shard in shards):
        schema = schema.append(FAULTS)
    place.write(_samples_file(stem), _serialise(samples, metadata))
    place.write(_index_file(stem), _serialise(pa.Table.from_pylist(rows, schema=schema), metadata))


def read_shards(place: Location, stem: str) -> tuple[tuple[ShardInfo, ...], dict[str, str]] | None:
    """The table of shards and its metadata of the index ``stem``, None if there is none.

    Raises:
        ShardError: the file is damaged, or of a format that this version does not read.
    """
    file = _index_file(stem)
    content = place.read(file)
    if content is None:
        return None
    table = _parse(content, place.path(file))
    metadata = _metadata(table)
    if metadata.get("format") != FORMAT_VERSION or not _has_shards(table):
        raise ShardError(f"{place.path(file)} is not an index of shards that this version reads: {how_to_index(place)}")
    known = [name for name in (*SHARDS_SCHEMA.names, FAULTS.name) if name in table.column_names]
    return tuple(_shard(row) for row in table.select(known).to_pylist()), metadata


def read_samples(place: Location, stem: str, fingerprint: str, source: str) -> pa.Table:
    """The table of samples that belongs to the index with this fingerprint, of the shards in ``source``.

    Raises:
        ShardError: the file is missing, damaged or another index's.
    """
    file = _samples_file(stem)
    content = place.read(file)
    table = None if content is None else _parse(content, place.path(file))
    if table is None or _metadata(table).get("fingerprint") != fingerprint:
        found = "is missing" if table is None else f"does not belong to the {_index_file(stem)} beside it"
        raise ShardError(f"{place.path(file)} {found}: {how_to_index(source)}")
    return table.replace_schema_metadata(None)


def how_to_index(place: Location | str) -> str:
    """The remedy for an index that does not fit."""
    return f"index again with `codec-dist shards index {shlex.quote(str(place))}`"


def _index_file(stem: str) -> str:
    return f"{stem}.parquet"


def _samples_file(stem: str) -> str:
    return f"{stem}-samples.parquet"


def _row(shard: ShardInfo) -> dict[str, Any]:
    return vars(shard) | {"faults": [{"position": position, "reason": reason} for position, reason in shard.faults]}


def _shard(row: dict[str, Any]) -> ShardInfo:
    faults = tuple((fault["position"], fault["reason"]) for fault in row.pop("faults", None) or ())
    return ShardInfo(**row, faults=faults)


def _has_shards(table: pa.Table) -> bool:
    """Whether a table has the columns of shards, of their types, and in them values that shards can have."""
    if [table.column_names.count(name) for name in SHARDS_SCHEMA.names] != [1] * len(SHARDS_SCHEMA):
        return False
    found = table.select(SHARDS_SCHEMA.names)
    if found.schema.remove_metadata() != SHARDS_SCHEMA or any(column.null_count for column in found.columns):
        return False
    return all((pc.min(found[name]).as_py() or 0) >= 0 for name in ("samples", "bytes"))


def _serialise(table: pa.Table, metadata: dict[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _parse(content: bytes, path: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise ShardError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()}
