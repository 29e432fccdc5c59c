"""The index of a folder of shards: one table of shards, one of samples, and a fingerprint."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.shards.classes import read_classes
from codec_dist.shards.errors import ShardError
from codec_dist.shards.labels import read_label
from codec_dist.shards.location import Location
from codec_dist.shards.streams import HashingStream, stream_samples
from codec_dist.utils import Progress, hash_json

INDEX_FILE = "index.parquet"
SAMPLES_FILE = "index-samples.parquet"
FORMAT_VERSION = "1"
SHARDS_SCHEMA = pa.schema(
    [("name", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("fingerprint", pa.string())]
)
SAMPLES_SCHEMA = pa.schema(
    [("shard", pa.string()), ("position", pa.int32()), ("key", pa.string()), ("label", pa.int32())]
)


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, number of samples, size, and the SHA-256 of its bytes."""

    name: str
    samples: int
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds. Only the table of shards is in memory until :meth:`samples`."""

    location: str
    """Folder or URL of the tars."""
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

    @property
    def sample_count(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def samples(self) -> pa.Table:
        """Table (shard: str, position: int32, key: str, label: int32, null if unlabelled), by shard and position.

        Raises:
            ShardError: the table of samples is missing or belongs to another index.
        """
        table = self.table if self.table is not None else self._kept_samples()
        return table.slice(0, self.sample_count)

    def _kept_samples(self) -> pa.Table:
        place = Location(self.kept_in or self.location)
        content = place.read(SAMPLES_FILE)
        table = None if content is None else _parse(content, place.path(SAMPLES_FILE))
        if table is None or _metadata(table).get("fingerprint") != self.kept_fingerprint:
            found = "is missing" if table is None else f"does not belong to the {INDEX_FILE} beside it"
            raise ShardError(f"{place.path(SAMPLES_FILE)} {found}: {_how_to_index(self.location)}")
        return table.replace_schema_metadata(None)


def load_index(location: str | Path, cache: Path | None = None, label_field: str = "cls") -> ShardIndex:
    """The index of a folder of shards, made by one scan if there is none yet.

    A new index is kept beside the tars, or in ``cache`` where that cannot be written or holds the index
    of another label field.

    Args:
        location: folder or URL.
        cache: local folder for the index of a read-only source.
        label_field: extension of the member with the integer label, or ``json:FIELD``.

    Raises:
        ShardError: no tars, tars that the index does not know, tars missing or of another size, or
            whatever :func:`build_index` raises.
    """
    place = Location(location)
    index = _read_index(place, place, label_field)
    if index is None and cache is not None:
        index = _read_index(Location(cache), place, label_field)
    if index is None:
        index = _scan(place, label_field)
        keep_beside = place.read(INDEX_FILE) is None
        return _keep(index, [*([place] if keep_beside else []), *([Location(cache)] if cache else [])])
    _compare_with_listing(index, place)
    return index


def build_index(location: str | Path, cache: Path | None = None, label_field: str = "cls") -> ShardIndex:
    """Scan all tars anew and keep the index beside them, or in ``cache`` where that cannot be written.

    Every byte is read once (for the fingerprints); no image is decoded.

    Raises:
        ShardError: no tars, a damaged tar, a key that occurs twice in a tar, a label outside classes.json,
            or no label at all where a JSON field was named.
    """
    place = Location(location)
    return _keep(_scan(place, label_field), [place, *([Location(cache)] if cache else [])])


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
        shards.append(replace(shard, samples=min(shard.samples, left)))
        left -= shard.samples
    fingerprint = fingerprint_of(shards, index.label_field)
    return replace(index, shards=tuple(shards), fingerprint=fingerprint)


def fingerprint_of(shards: Iterable[ShardInfo], label_field: str) -> str:
    """Hash of a data set: names, counts and fingerprints of its shards, and where labels are read from."""
    return hash_json([label_field, [[shard.name, shard.samples, shard.fingerprint] for shard in shards]])


def write_index(index: ShardIndex, place: Location) -> None:
    """Write both index files; the one that readers look for comes last.

    Raises:
        OSError: the place is read-only or full.
    """
    metadata = {
        "format": FORMAT_VERSION,
        "location": index.location,
        "label_field": index.label_field,
        "fingerprint": index.fingerprint,
    }
    rows = [vars(shard) for shard in index.shards]
    place.write(SAMPLES_FILE, _serialise(index.samples(), metadata))
    place.write(INDEX_FILE, _serialise(pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA), metadata))


def _scan(place: Location, label_field: str) -> ShardIndex:
    tars = place.tars()
    if not tars:
        raise ShardError(
            f"no tars in {place}: expected shards such as shard-000000.tar; make them with `codec-dist shards pack`"
        )
    classes = read_classes(place)
    shards, tables = [], []
    with Progress("index", total=len(tars), unit="shards") as progress:
        for name in tars:
            info, table = scan_shard(place, name, label_field)
            _check_labels(table, classes, place)
            shards.append(info)
            tables.append(table)
            progress.advance(note=name)
    samples = pa.concat_tables(tables)
    if label_field.startswith("json:") and samples["label"].null_count == len(samples):
        raise ShardError(f"no sample in {place} has an integer label in {label_field}: check data.label_field")
    fingerprint = fingerprint_of(shards, label_field)
    return ShardIndex(place.text, tuple(shards), fingerprint, classes, label_field, None, fingerprint, samples)


def scan_shard(place: Location, name: str, label_field: str) -> tuple[ShardInfo, pa.Table]:
    """One tar's entry in the index, and its table of samples (bad labels count as none)."""
    labels: dict[str, int | None] = {}
    with place.open(name) as file:
        stream = HashingStream(file)
        for sample in stream_samples(stream, place.path(name)):
            key = sample["__key__"]
            if key in labels:
                raise ShardError(
                    f"{place.path(name)} holds the key {key!r} twice, apart from each other: "
                    "members of one sample must be adjacent and keys different; pack it again"
                )
            labels[key] = read_label(sample, label_field)[0]
        fingerprint = stream.drain()
    columns = [[name] * len(labels), range(len(labels)), labels.keys(), labels.values()]
    try:
        arrays = [pa.array(list(column), kind.type) for column, kind in zip(columns, SAMPLES_SCHEMA)]
    except UnicodeEncodeError as error:
        raise ShardError(
            f"{place.path(name)} holds a key that is not UTF-8: {error.object!r}; pack it again"
        ) from error
    table = pa.Table.from_arrays(arrays, schema=SAMPLES_SCHEMA)
    return ShardInfo(name, len(labels), stream.bytes, fingerprint), table


def _check_labels(table: pa.Table, classes: tuple[str, ...] | None, place: Location) -> None:
    if classes is None:
        return
    bad = table.filter(pc.greater_equal(table["label"], len(classes)))
    if len(bad):
        row = bad.slice(0, 1).to_pylist()[0]
        raise ShardError(
            f"the label {row['label']} of {row['key']!r} in {place.path(row['shard'])} is out of range: "
            f"classes.json names {len(classes)} classes (0 to {len(classes) - 1})"
        )


def _read_index(folder: Location, place: Location, label_field: str) -> ShardIndex | None:
    content = folder.read(INDEX_FILE)
    if content is None:
        return None
    table = _parse(content, folder.path(INDEX_FILE))
    metadata = _metadata(table)
    if metadata.get("format") != FORMAT_VERSION or not set(SHARDS_SCHEMA.names) <= set(table.column_names):
        raise ShardError(
            f"{folder.path(INDEX_FILE)} is not an index of shards that this version reads: {_how_to_index(place)}"
        )
    elsewhere = folder.text != place.text and metadata.get("location") != place.text
    if elsewhere or metadata.get("label_field") != label_field:
        return None
    shards = tuple(ShardInfo(**row) for row in table.select(SHARDS_SCHEMA.names).to_pylist())
    fingerprint = fingerprint_of(shards, label_field)
    return ShardIndex(place.text, shards, fingerprint, read_classes(place), label_field, folder.text, fingerprint)


def _keep(index: ShardIndex, places: list[Location]) -> ShardIndex:
    for place in places:
        try:
            write_index(index, place)
        except OSError:
            continue
        return replace(index, kept_in=place.text)
    return index


def _compare_with_listing(index: ShardIndex, place: Location) -> None:
    if place.scheme in ("http", "https"):
        return  # Many web servers list nothing; reading a shard checks it.
    found, known = place.tars(), {shard.name: shard.bytes for shard in index.shards}
    remedy = _how_to_index(place)
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


def _how_to_index(place: Location | str) -> str:
    return f"index anew with `codec-dist shards index {place}`"


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
