"""The index of a folder of shards: one table of shards, one of samples, class names, and a fingerprint."""

import json
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.shards.errors import DamagedTarError, ShardError
from codec_dist.shards.location import WEB, Location, Retries
from codec_dist.shards.scanning import Findings, ShardInfo, scan_shard
from codec_dist.shards.tar import dotted_fields
from codec_dist.utils import Progress, hash_json, without_credentials

# Tars that are read at once; more than processors, as remote ones are waited for.
SCANNED_AT_ONCE = 4
NAMED = 3
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")

FORMAT_VERSION = "1"
SHARDS_SCHEMA = pa.schema(
    [("name", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("fingerprint", pa.string())]
)
# Only where there are problems: most data sets have none.
# The name of the column in files of earlier versions.
OLD_PROBLEMS = "faults"
PROBLEMS = pa.field("problems", pa.list_(pa.struct([("position", pa.int32()), ("reason", pa.string())])))

CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds. Only the table of shards is in memory until :meth:`samples`."""

    location: str
    """Folder or URL of the tars, or the pattern that names them."""
    shards: tuple[ShardInfo, ...]
    """In the order of names."""
    fingerprint: str
    """Hash of the shards' names, counts and fingerprints, and of the label field."""
    classes: tuple[str, ...] | None
    """Class names by label, where the data set names them."""
    label_field: str = "cls"
    """Where labels were read from."""
    kept_in: str | None = None
    """Folder of the index files; None if they could not be kept."""
    kept_fingerprint: str = ""
    """Fingerprint of the index as kept (another than ``fingerprint`` once samples are limited)."""
    table: pa.Table | None = field(default=None, repr=False, compare=False)
    """The table of samples where it is in memory."""
    findings: Findings | None = field(default=None, repr=False, compare=False)
    """What else the scan found; None if the index was not made by this process."""
    dotted_fields: tuple[str, ...] = ()
    """Extensions with dots that were taken for images of their sample."""

    @property
    def sample_count(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def problem_count(self) -> int:
        """Samples of which the index alone tells that they cannot be used."""
        return sum(len(shard.problems) for shard in self.shards)

    def samples(self) -> pa.Table:
        """Table (shard: str, position: int32, key: str, label: int32, null if unlabelled), by shard and position.

        Raises:
            ShardError: the table of samples is missing or belongs to another index.
        """
        table = self.table
        if table is None:
            kept = Location(self.kept_in or self.location)
            stem = Location(self.location).index_stem
            table = read_samples(kept, stem, self.kept_fingerprint, self.location)
        return table.slice(0, self.sample_count)


def load_index(
    location: str | Path,
    cache: Path | None = None,
    label_field: str = "cls",
    retries: Retries | None = None,
    image_fields: Sequence[str] = IMAGE_FIELDS,
) -> ShardIndex:
    """The index of a folder of shards, or of those that a pattern names, made by one scan if there is none yet.

    A new index is kept beside the tars, or in ``cache`` where that cannot be written or holds the index
    of another label field. A pattern has an index of its own, which leaves the folder's as it is.

    Args:
        location: folder, URL, or either with a pattern for file names.
        cache: local folder for the index of a read-only source.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        retries: patience with a remote source.
        image_fields: extensions that hold images; those with dots decide what is one sample.

    Raises:
        ShardError: no tars, tars that the index does not know, tars missing or of another size, other classes
            than when it was made, or whatever :func:`build_index` raises.
    """
    place = Location(location, retries)
    wanted = (label_field, dotted_fields(image_fields))
    index = _read_index(place, place, *wanted)
    if index is None and cache is not None:
        index = _read_index(Location(cache), place, *wanted)
    if index is None:
        index = _scan(place, label_field, image_fields)
        keep_beside = read_shards(place, place.index_stem) is None
        return _keep(index, [*([place] if keep_beside else []), *([Location(cache)] if cache else [])])
    _compare_with_listing(index, place)
    return index


def build_index(
    location: str | Path,
    cache: Path | None = None,
    label_field: str = "cls",
    retries: Retries | None = None,
    image_fields: Sequence[str] = IMAGE_FIELDS,
) -> ShardIndex:
    """Scan all tars again and keep the index beside them, or in ``cache`` where that cannot be written.

    Every byte is read once (for the fingerprints), a few tars at a time; no image is decoded. Samples whose key
    occurs again or whose label has no class are counted in the index, and unusable for whoever reads them.

    Raises:
        ShardError: no tars, damaged ones (all are named), or no label at all where a JSON field was named.
    """
    place = Location(location, retries)
    index = _scan(place, label_field, image_fields)
    return _keep(index, [place, *([Location(cache)] if cache else [])])


def limit_samples(index: ShardIndex, n: int) -> ShardIndex:
    """The first ``n`` samples in the order of shards (all, if there are fewer).

    Raises:
        ShardError: ``n`` is less than 1.
    """
    if n < 1:
        raise ShardError(f"a limit of {n} samples was asked: at least 1 is needed")
    shards, left = [], n
    for shard in index.shards:
        if left <= 0:
            break
        problems = tuple(problem for problem in shard.problems if problem[0] < left)
        shards.append(replace(shard, samples=min(shard.samples, left), problems=problems))
        left -= shard.samples
    fingerprint = fingerprint_of(shards, index.label_field)
    return replace(index, shards=tuple(shards), fingerprint=fingerprint)


def fingerprint_of(shards: Iterable[ShardInfo], label_field: str) -> str:
    """Hash of a data set: its shards' names, counts, fingerprints and problems, and where labels are read from."""
    entries = []
    for shard in shards:
        problems = [[position for position, _ in shard.problems]] if shard.problems else []
        entries.append([shard.name, shard.samples, shard.fingerprint, *problems])
    return hash_json([label_field, entries])


def write_index(index: ShardIndex, place: Location) -> None:
    """Write both index files.

    Raises:
        OSError: the place is read-only or full.
    """
    metadata = {
        "location": without_credentials(index.location),
        "label_field": index.label_field,
        "fingerprint": index.fingerprint,
        "classes": str(len(index.classes or ())),
        "dotted_fields": " ".join(index.dotted_fields),
    }
    write_tables(place, Location(index.location).index_stem, index.shards, index.samples(), metadata)


def _scan(place: Location, label_field: str, image_fields: Sequence[str]) -> ShardIndex:
    tars = place.tars()
    if not tars:
        raise ShardError(
            f"no tars in {place}: expected shards such as shard-000000.tar; make them with `codec-dist shards pack`"
        )
    classes = read_classes(place)
    shards, tables, findings = [], [], Findings()
    for info, table, found in _scan_tars(place, tars, label_field, len(classes) if classes else None, image_fields):
        shards.append(info)
        tables.append(table)
        findings.merge(found)
    samples = pa.concat_tables(tables)
    if label_field.startswith("json:") and samples["label"].null_count == len(samples):
        raise ShardError(f"no sample in {place} has an integer label in {label_field}: check data.label_field")
    fingerprint = fingerprint_of(shards, label_field)
    dotted = dotted_fields(image_fields)
    return ShardIndex(
        place.text, tuple(shards), fingerprint, classes, label_field, None, fingerprint, samples, findings, dotted
    )


def _scan_tars(
    place: Location, tars: dict[str, int | None], label_field: str, classes: int | None, image_fields: Sequence[str]
) -> list[tuple[ShardInfo, pa.Table, Findings]]:
    entries: list[tuple[ShardInfo, pa.Table, Findings]] = []
    damaged: list[DamagedTarError] = []
    with Progress("index", total=len(tars), unit="shards") as progress, ThreadPoolExecutor(SCANNED_AT_ONCE) as pool:
        try:
            scans = [
                pool.submit(scan_shard, place, name, label_field, classes, tars[name], image_fields) for name in tars
            ]
            for name, scan in zip(tars, scans):
                try:
                    entries.append(scan.result())
                except DamagedTarError as error:
                    damaged.append(error)
                progress.advance(note=name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if damaged:
        named = "; ".join(map(str, damaged[:NAMED])) + (", ..." if len(damaged) > NAMED else "")
        counts = f"{len(damaged):,} of {len(tars):,} tars in {place} are damaged: " if len(tars) > 1 else ""
        raise ShardError(f"{counts}{named}; restore or remove what is damaged")
    return entries


def _read_index(folder: Location, place: Location, label_field: str, dotted: tuple[str, ...]) -> ShardIndex | None:
    found = read_shards(folder, place.index_stem)
    if found is None:
        return None
    shards, metadata = found
    beside = folder.folder == place.folder
    known = beside or metadata.get("location") == without_credentials(place.text)
    made_for = (metadata.get("label_field"), tuple(metadata.get("dotted_fields", "").split()))
    if made_for != (label_field, dotted) or not known:
        return None
    classes = read_classes(place)
    count = str(len(classes or ()))
    if metadata.get("classes", count) != count:
        # Which labels are out of range is another question now.
        if not beside:
            return None
        raise ShardError(
            f"classes.json in {place.folder} names {count} classes, and named {metadata['classes']} when the shards "
            f"were indexed: {how_to_index(place)}"
        )
    fingerprint = fingerprint_of(shards, label_field)
    return ShardIndex(
        place.text, shards, fingerprint, classes, label_field, folder.folder, fingerprint, dotted_fields=dotted
    )


def _keep(index: ShardIndex, places: list[Location]) -> ShardIndex:
    for place in places:
        try:
            write_index(index, place)
        except OSError:
            continue
        return replace(index, kept_in=place.folder)
    return index


def _compare_with_listing(index: ShardIndex, place: Location) -> None:
    if place.scheme in WEB:
        return  # Many web servers list nothing; reading a shard checks it.
    found, known = place.tars(), {shard.name: shard.bytes for shard in index.shards}
    remedy = how_to_index(place)
    if missing := [name for name in known if name not in found]:
        counts = f"{len(missing)} of {len(known)} shards are missing in {place}"
        raise ShardError(f"{counts}, first {missing[0]}: restore them, or {remedy}")
    if unknown := [name for name in found if name not in known]:
        counts = f"{place} holds {len(unknown)} tars that its index does not know"
        raise ShardError(f"{counts}, first {unknown[0]}: {remedy}")
    for name, size in known.items():
        if found[name] is not None and found[name] != size:
            sizes = f"{place.path(name)} has {found[name]:,} bytes where the index says {size:,}"
            raise ShardError(f"{sizes}: it is cut short or was replaced; restore it, or {remedy}")


# ---- The two files of an index: ``index.parquet`` and ``index-samples.parquet``; with a pattern, ``index-HASH...``


def write_tables(
    place: Location, stem: str, shards: Sequence[ShardInfo], samples: pa.Table, metadata: dict[str, str]
) -> None:
    """Write both files of the index ``stem``, each whole or not at all; the one that readers look for comes last.

    Raises:
        OSError: the place is read-only or full.
    """
    metadata = {"format": FORMAT_VERSION} | metadata
    schema, rows = SHARDS_SCHEMA, [_row(shard) for shard in shards]
    if any(shard.problems for shard in shards):
        schema = schema.append(PROBLEMS)
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
    table = _parse_table(content, place.path(file))
    metadata = _metadata(table)
    if metadata.get("format") != FORMAT_VERSION or not _has_shards(table):
        raise ShardError(f"{place.path(file)} is not an index of shards that this version reads: {how_to_index(place)}")
    known = [name for name in (*SHARDS_SCHEMA.names, PROBLEMS.name, OLD_PROBLEMS) if name in table.column_names]
    return tuple(_shard(row) for row in table.select(known).to_pylist()), metadata


def read_samples(place: Location, stem: str, fingerprint: str, source: str) -> pa.Table:
    """The table of samples that belongs to the index with this fingerprint, of the shards in ``source``.

    Raises:
        ShardError: the file is missing, damaged or another index's.
    """
    file = _samples_file(stem)
    content = place.read(file)
    table = None if content is None else _parse_table(content, place.path(file))
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
    return vars(shard) | {"problems": [{"position": position, "reason": reason} for position, reason in shard.problems]}


def _shard(row: dict[str, Any]) -> ShardInfo:
    found = [*(row.pop(PROBLEMS.name, None) or ()), *(row.pop(OLD_PROBLEMS, None) or ())]
    return ShardInfo(**row, problems=tuple((problem["position"], problem["reason"]) for problem in found))


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


def _parse_table(content: bytes, path: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise ShardError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()}


# ---- Class names beside the shards: ``classes.json``, a list by label


def read_classes(place: Location) -> tuple[str, ...] | None:
    """Class names by label, None if there is no ``classes.json``.

    Raises:
        ShardError: the file is neither a list of names nor an object from "0", "1", … to names.
    """
    content = place.read(CLASSES_FILE)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ShardError(f"{place.path(CLASSES_FILE)} is not JSON: {error}") from error
    if isinstance(values, dict) and set(values) == {str(label) for label in range(len(values))}:
        values = [values[str(label)] for label in range(len(values))]
    if not isinstance(values, list) or not values or not all(isinstance(name, str) for name in values):
        raise ShardError(f'{place.path(CLASSES_FILE)} names no classes: expected ["name of 0", "name of 1", ...]')
    return tuple(values)


def write_classes(place: Location, classes: Sequence[str]) -> None:
    """Write ``classes.json``, whole or not at all."""
    place.write(CLASSES_FILE, (json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n").encode())
