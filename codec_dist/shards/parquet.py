"""Images in Parquet files, as many public data sets ship: a column of encoded bytes, and one of labels."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.shards.errors import ShardError
from codec_dist.shards.labels import LARGEST_LABEL
from codec_dist.shards.samples import Sample
from codec_dist.shards.sources import is_image_name, path_key
from codec_dist.utils import suggestion

# What is held at once: rows, and bytes of each column's pages.
ROWS_AT_ONCE = 32
PAGE_BYTES = 1 << 20
LABEL_NAMES = ("label", "labels", "cls", "class")
MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def is_parquet(path: str | Path) -> bool:
    """Whether a path names Parquet files: one, a pattern for some, or a folder that holds them rather than images."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return str(path).endswith(".parquet") or any(name.endswith(".parquet") for name in glob.glob(str(folder)))
    # The first file of either kind decides, so that a folder of a million images is not searched to its end.
    for _, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".parquet") or is_image_name(name):
                return name.endswith(".parquet")
    return False


def parquet_images(
    path: str | Path, image_column: str | None = None, label_column: str | None = None
) -> tuple["ParquetImages", list[str]]:
    """Images of Parquet files, read row by row, and the names of their classes (none if they have no names).

    The image column holds encoded images, or structs with a field ``bytes`` as the ``datasets`` library of Hugging Face
    writes them. Labels are integers (−1 and null: no label), named by that library's metadata if it is there, or
    strings, whose classes are their sorted values. Keys are FILE/ROW: the file's path below the folder that is common
    to all, without extension and percent-encoded as in image folders, and the number of the row in 8 digits.

    Memory is bounded by 32 rows and twice the largest page, however large row groups are (pyarrow writes pages of at
    most 1,024 rows, and files of the ``datasets`` library row groups of 100).

    Args:
        path: a file, a pattern such as ``data/train-*.parquet``, or a folder whose Parquet files are all taken.
        image_column: name; default: the one column that can hold images.
        label_column: name; default: the only column with class names, or one called label, labels, cls or class;
            no labels if there is none.

    Raises:
        ShardError: no files, files that are damaged or of different columns, no or several columns that may be meant, a
            row without an image, or labels that are neither integers nor strings.
    """
    root, files = _find(path)
    schema = _schema(files[0])
    for file in files[1:]:
        if not _schema(file).equals(schema):
            raise ShardError(f"{file} has other columns than {files[0]}: name files of one data set, e.g. by a pattern")
    names = _class_names(schema)
    image = _image_column(schema, image_column, files[0])
    label = _label_column(schema, label_column, names, files[0])
    rows = sum(_check_images(file, image) for file in files)
    classes = names.get(label or "", [])
    if label is not None and _is_text(schema.field(label).type):
        classes = _text_classes(files, label)
    return ParquetImages(root, files, image, label, classes, rows), classes


class ParquetImages:
    """A stream over the rows of Parquet files, in their order."""

    def __init__(
        self, root: Path, files: Sequence[Path], image: str, label: str | None, classes: Sequence[str], rows: int
    ) -> None:
        self._root, self._files, self._image, self._label, self._rows = root, files, image, label, rows
        self._labels = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Sample]:
        for file in self._files:
            stem = path_key(file.relative_to(self._root).as_posix())
            for number, (image, path, label) in enumerate(self._rows_of(file)):
                if image is None:
                    raise ShardError(f"row {number} of {file} has no image in {self._image}: leave such rows out")
                yield Sample(f"{stem}/{number:08d}", image, _extension(image, path), self._number(label, number, file))

    def _rows_of(self, file: Path) -> Iterator[tuple[bytes | None, str | None, Any]]:
        columns = [self._image] if self._label is None else [self._image, self._label]
        with _opened(file) as parquet:
            for batch in _batches(parquet, columns, file):
                images, paths = _bytes_and_paths(batch[self._image])
                labels = [None] * len(batch) if self._label is None else batch[self._label].to_pylist()
                yield from zip(images, paths, labels)

    def _number(self, label: Any, row: int, file: Path) -> int | None:
        if label is None or label == -1:
            return None
        if isinstance(label, str):
            return self._labels[label]
        if not 0 <= label <= LARGEST_LABEL:
            raise ShardError(f"the label {label} in row {row} of {file} is out of range: expected integers from 0")
        return int(label)


def _find(path: str | Path) -> tuple[Path, list[Path]]:
    """The folder that is common to all files, and the files in the order of their paths."""
    if "://" in str(path):
        raise ShardError(f"cannot read {path}: Parquet files are read from local paths; copy them to one")
    given = Path(path).expanduser().absolute()
    if given.is_dir():
        files = [Path(parent, name) for parent, _, names in os.walk(given, followlinks=True) for name in names]
        files = [file for file in files if file.suffix == ".parquet" and not file.name.startswith(".")]
    else:
        files = [given] if given.is_file() else [Path(name) for name in glob.glob(str(given), recursive=True)]
    if not files:
        raise ShardError(f"there are no Parquet files at {path}: give a file, a pattern or a folder that holds some")
    return Path(os.path.commonpath([file.parent for file in files])), sorted(files)


def _opened(file: Path) -> pq.ParquetFile:
    try:
        # With a buffer, pages are read as they are needed; else whole row groups are.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=PAGE_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{file} is not a readable Parquet file: {' '.join(str(error).split())}") from error


def _batches(parquet: pq.ParquetFile, columns: list[str], file: Path, rows: int = ROWS_AT_ONCE) -> Iterator[Any]:
    try:
        yield from parquet.iter_batches(rows, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{file} is damaged: {' '.join(str(error).split())}") from error


def _schema(file: Path) -> pa.Schema:
    with _opened(file) as parquet:
        return parquet.schema_arrow


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of classes by column, from the metadata of the ``datasets`` library."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }


def _image_column(schema: pa.Schema, asked: str | None, file: Path) -> str:
    possible = [field.name for field in schema if _holds_bytes(field.type)]
    if asked is not None:
        if asked not in schema.names:
            raise ShardError(f"{file} has no column {asked!r} for images: {suggestion(asked, schema.names)}")
        if asked not in possible:
            raise ShardError(f"the column {asked!r} of {file} is {schema.field(asked).type}: images are bytes")
        return asked
    if len(possible) != 1:
        found = f"the columns {', '.join(possible)} may hold images" if possible else "no column can hold images"
        raise ShardError(f"{found} in {file} (columns: {', '.join(schema.names)}): name one with --image-column")
    return possible[0]


def _label_column(schema: pa.Schema, asked: str | None, names: dict[str, list[str]], file: Path) -> str | None:
    if asked is not None and asked not in schema.names:
        raise ShardError(f"{file} has no column {asked!r} for labels: {suggestion(asked, schema.names)}")
    usual = [name for name in LABEL_NAMES if name in schema.names]
    possible = [asked] if asked else [name for name in names if name in schema.names] or usual
    if len(possible) > 1:
        raise ShardError(f"the columns {', '.join(possible)} of {file} may hold labels: name one with --label-column")
    if not possible:
        return None
    kind = schema.field(possible[0]).type
    if not _is_text(kind) and not pa.types.is_integer(kind):
        raise ShardError(f"the column {possible[0]!r} of {file} is {kind}: labels are integers or strings")
    return possible[0]


def _check_images(file: Path, image: str) -> int:
    """Number of rows; rows without image are found by the file's statistics, before any is read."""
    with _opened(file) as parquet:
        metadata = parquet.metadata
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                if column.path_in_schema not in (image, f"{image}.bytes"):
                    continue
                if column.is_stats_set and column.statistics.has_null_count and column.statistics.null_count:
                    counts = f"{column.statistics.null_count:,} of {column.num_values:,} rows"
                    raise ShardError(
                        f"{counts} in row group {group} of {file} have no image in {image}: leave them out"
                    )
        return int(metadata.num_rows)


def _text_classes(files: Sequence[Path], label: str) -> list[str]:
    found: set[str] = set()
    for file in files:
        with _opened(file) as parquet:
            for batch in _batches(parquet, [label], file, rows=1 << 16):
                found.update(
                    value for value in pc.unique(batch[label].cast(pa.string())).to_pylist() if value is not None
                )
    return sorted(found)


def _bytes_and_paths(column: Any) -> tuple[list[bytes | None], list[str | None]]:
    if not pa.types.is_struct(column.type):
        return column.to_pylist(), [None] * len(column)
    values = column.to_pylist()
    return [value and value["bytes"] for value in values], [value and value.get("path") for value in values]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _extension(image: bytes, path: str | None) -> str:
    """By the image's first bytes; by its name where they say nothing, so that reading can say what is wrong."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    for magic, extension in MAGIC.items():
        if image.startswith(magic):
            return extension
    named = os.path.splitext(path or "")[1][1:].lower()
    return named if named.isalnum() and named.isascii() and named not in ("cls", "json") else "bin"
