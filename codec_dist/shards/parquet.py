"""Images in Parquet files, as many public data sets ship: a column of encoded bytes, and one of labels."""

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.shards.class_lists import ClassList, label_warnings, match_classes, ordered_names
from codec_dist.shards.errors import ShardError
from codec_dist.shards.folder_tree import read_folder_tree
from codec_dist.shards.image_files import NoImageError, as_member, image_suffixes, suffix_of
from codec_dist.shards.samples import LARGEST_LABEL, Sample, file_key
from codec_dist.shards.tally import Tally
from codec_dist.shards.tar import why_passed_over
from codec_dist.utils import suggestion

# What is held at once: rows, and bytes of each column's pages.
ROWS_AT_ONCE = 32
PAGE_BYTES = 1 << 20
# How columns of labels are called, in lower case with `_` between words: label, class_id, fine_label, target, ...
LABEL_NAME = re.compile(
    r"((.*_)?(labels?|cls|class|classes|targets?|category|categories)|y|wnid|synset)"
    r"(_?(ids?|idx|index|indices|names?|text|str|int|num|number|code))?"
)
UNKNOWN = -2
# What no image could be decoded from is packed under the extension that its first bytes, or else its name, tell.
MAGIC = {b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
# As programs that know only numbers with a fraction, or only texts, write integers.
INTEGER = re.compile(r"([+-]?[0-9]{1,10})(\.0*)?")
NO_LABELS = "none"


def is_parquet(path: str | Path) -> bool:
    """Whether a path names Parquet files: one, a pattern for some, or a folder that holds them rather than images."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return any(suffix_of(str(name)) == "parquet" for name in (path, *glob.glob(str(folder))))
    # The first file of either kind decides, so that a folder of a million images is not searched to its end.
    visited = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = sorted(name for name in folders if real[name] not in visited)
        visited.update(real.values())
        for name in sorted(files):
            if why_passed_over(name) is None and suffix_of(name) in {"parquet", *image_suffixes()}:
                return suffix_of(name) == "parquet"
    return False


def parquet_images(
    path: str | Path,
    image_column: str | None = None,
    label_column: str | None = None,
    class_list: ClassList | None = None,
) -> tuple["ParquetImages", list[str]]:
    """Images of Parquet files, read row by row, and the names of their classes (none if they have no names).

    The image column holds encoded images, or structs with a field ``bytes`` as the ``datasets`` library of Hugging Face
    writes them; they are packed as in image folders. Labels are whole numbers (−1, null and NaN: no label), named by
    that library's metadata if it is there, or strings (empty: no label), whose classes are their sorted values; strings
    that are all integers are these integers. With ``class_list`` strings and named integers get the places of their
    names in it; integers without names are such places. Keys are FILE/ROW: the file's path below the folder that is
    common to all, without suffix and encoded as in image folders, and the number of the row in 8 digits.

    Memory is bounded by 32 rows and twice the largest page, however large row groups are (pyarrow writes pages of at
    most 1,024 rows, and files of the ``datasets`` library row groups of 100).

    Args:
        path: a file, a pattern such as ``data/train-*.parquet``, or a folder whose Parquet files are all taken.
        image_column: name; default: the one column that can hold images.
        label_column: name; default: the only column with class names, or with the name of one for labels (label, class,
            target, category, label_id, fine_label, ..., upper or lower case); no labels, and a note, if there is none.
            ``none``: no labels.
        class_list: the classes of the model that the shards are for.

    Raises:
        ShardError: no files, files that are damaged or of different columns, no or several columns that may be meant, a
            row without an image, labels that are neither whole numbers nor strings, or that ``class_list`` lacks.
    """
    root, files, left_out = _find(path)
    schema = _schema(files[0])
    for file in files[1:]:
        if not _schema(file).equals(schema):
            raise ShardError(f"{file} has other columns than {files[0]}: name files of one data set, e.g. by a pattern")
    names = _class_names(schema)
    image = _image_column(schema, image_column, files[0])
    label = _label_column(schema, label_column, names, image, files[0])
    rows = sum(_check_images(file, image) for file in files)
    labels = _labels(files, schema, label, names.get(label or "", []), class_list)
    notes = list(labels.notes)
    if label is None and label_column is None and (others := [name for name in schema.names if name != image]):
        notes.append(f"no column of labels was found (columns: {', '.join(others)}): name one with --label-column")
    return ParquetImages(root, files, image, label, labels, rows, notes, left_out), list(labels.classes)


class Labels(NamedTuple):
    """How the values of a column become labels."""

    classes: Sequence[str]
    """Names by label; empty where integers have none."""
    numbers: Mapping[Any, int] | None
    """Value → label; None where integers are taken as they are."""
    notes: Sequence[str] = ()
    limit: int = LARGEST_LABEL + 1
    """Labels from this number on are out of range."""


class ParquetImages:
    """A stream over the rows of Parquet files, in their order."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        image: str,
        label: str | None,
        labels: Labels,
        rows: int,
        notes: Sequence[str],
        left_out: Tally,
    ) -> None:
        self._root, self._files, self._image, self._label, self._rows = root, files, image, label, rows
        self._labels, self._unreadable = labels, Tally()
        self.left_out, self.changed, self.notes = left_out, Tally(), list(notes)

    def __len__(self) -> int:
        """Number of rows."""
        return self._rows

    def __iter__(self) -> Iterator[Sample]:
        for file in self._files:
            stem = file_key(os.path.splitext(file.relative_to(self._root).as_posix())[0])
            for number, (image, path, label) in enumerate(self._rows_of(file)):
                if image is None:
                    raise ShardError(f"row {number} of {file} has no image in {self._image}: leave such rows out")
                labelled = self._number(label, number, file)
                content, extension = self._member(image, path, f"row {number} of {file.name}")
                yield Sample(f"{stem}/{number:08d}", content, extension, labelled)
        if self._unreadable.total:
            self.notes += [f"packed, to be dropped when they are read: {line}" for line in self._unreadable.lines()]

    def _member(self, image: bytes, path: str | None, row: str) -> tuple[bytes, str]:
        """Content and extension; what is no image is packed as it is, so that its reader says what is wrong."""
        try:
            content, extension, change = as_member(image)
        except NoImageError as error:
            self._unreadable.add(str(error), row)
            return image, _extension(image, path)
        if change:
            self.changed.add(change, row)
        return content, extension

    def _rows_of(self, file: Path) -> Iterator[tuple[bytes | None, str | None, Any]]:
        columns = [self._image] if self._label is None else [self._image, self._label]
        with _opened(file) as parquet:
            for batch in _batches(parquet, columns, file):
                images, paths = _bytes_and_paths(batch[self._image])
                labels = [None] * len(batch) if self._label is None else batch[self._label].to_pylist()
                yield from zip(images, paths, labels)

    def _number(self, label: Any, row: int, file: Path) -> int | None:
        if label is None or label != label:  # NaN
            return None
        if isinstance(label, float) and not label.is_integer():
            raise ShardError(f"the label {label} in row {row} of {file} is no whole number")
        numbers = self._labels.numbers
        number = label if numbers is None or label == -1 else numbers.get(label, UNKNOWN)
        if number == -1:
            return None
        if not 0 <= number < self._labels.limit:
            known = "integers from 0" if self._labels.limit > LARGEST_LABEL else f"0 to {self._labels.limit - 1}"
            raise ShardError(f"the label {label} in row {row} of {file} is out of range: expected {known}")
        return int(number)


def _find(path: str | Path) -> tuple[Path, list[Path], Tally]:
    """The folder that is common to all files, the files in the order of their paths, and what is none in a folder."""
    if "://" in str(path):
        raise ShardError(f"cannot read {path}: Parquet files are read from local paths; copy them to one")
    given = Path(path).expanduser().absolute()
    left_out = Tally()
    if given.is_dir():
        tree = read_folder_tree(given, ("parquet",), "Parquet file")
        files, left_out = [given / name for name in tree.files], tree.left_out
    else:
        files = [given] if given.is_file() else [Path(name) for name in glob.glob(str(given), recursive=True)]
    if not files:
        raise ShardError(f"there are no Parquet files at {path}: give a file, a pattern or a folder that holds some")
    return Path(os.path.commonpath([file.parent for file in files])), sorted(files), left_out


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


def _image_column(schema: pa.Schema, requested: str | None, file: Path) -> str:
    possible = [field.name for field in schema if _holds_bytes(field.type)]
    if requested is not None:
        if requested not in schema.names:
            raise ShardError(f"{file} has no column {requested!r} for images: {suggestion(requested, schema.names)}")
        if requested not in possible:
            raise ShardError(f"the column {requested!r} of {file} is {schema.field(requested).type}: images are bytes")
        return requested
    if len(possible) != 1:
        found = f"the columns {', '.join(possible)} may hold images" if possible else "no column can hold images"
        raise ShardError(f"{found} in {file} (columns: {', '.join(schema.names)}): name one with --image-column")
    return possible[0]


def _label_column(
    schema: pa.Schema, requested: str | None, names: dict[str, list[str]], image: str, file: Path
) -> str | None:
    if requested is not None and requested not in schema.names:
        if requested == NO_LABELS:
            return None
        raise ShardError(f"{file} has no column {requested!r} for labels: {suggestion(requested, schema.names)}")
    candidates = [name for name in schema.names if name != image and (name in names or _is_label_name(name))]
    possible = (
        [requested]
        if requested
        else [c for c in candidates if not pa.types.is_nested(schema.field(c).type)] or candidates
    )
    if len(possible) > 1:
        raise ShardError(
            f"the columns {', '.join(possible)} of {file} may hold labels (columns: {', '.join(schema.names)}): name "
            "one with --label-column"
        )
    if not possible:
        return None
    kind = schema.field(possible[0]).type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ShardError(
            f"the column {possible[0]!r} of {file} is {kind}: labels are whole numbers or strings; name another of the "
            f"columns {', '.join(schema.names)} with --label-column, or `none`"
        )
    return possible[0]


def _is_label_name(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return bool(LABEL_NAME.fullmatch(re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")))


def _labels(
    files: Sequence[Path], schema: pa.Schema, label: str | None, named: Sequence[str], classes: ClassList | None
) -> Labels:
    """How the values of the column become labels, after a look at all of them where they are texts."""
    if label is None:
        return Labels([], None)
    if not _is_text(schema.field(label).type):
        if classes is None:
            return Labels(named, None, label_warnings(named, "class name"))
        if not named:
            note = f"the labels in {label} are integers, and taken as numbers of classes in {classes.source}"
            return Labels(classes.names, None, [note], len(classes))
        places, notes = match_classes(named, classes, "class name")
        return Labels(classes.names, {number: places[name] for number, name in enumerate(named)}, notes, len(classes))
    return _text_labels(_texts(files, label), label, classes)


def _text_labels(found: Sequence[str], label: str, classes: ClassList | None) -> Labels:
    texts = [text for text in found if text.strip()]
    numbers, notes = dict.fromkeys(found, -1), list[str]()
    if len(texts) < len(found):
        notes.append(f"rows whose {label} is an empty text have no label")
    integers = {text: int(match[1]) for text in texts if (match := INTEGER.fullmatch(text.strip()))}
    if classes is not None:
        places, more = match_classes(texts, classes, "label")
        return Labels(classes.names, numbers | places, [*notes, *more], len(classes))
    if texts and len(integers) == len(texts):
        notes.append(f"the labels in {label} are texts of integers, and taken as these integers")
        return Labels([], numbers | integers, notes)
    names, more = ordered_names(texts, "label")
    return Labels(names, numbers | {name: number for number, name in enumerate(names)}, [*notes, *more])


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


def _texts(files: Sequence[Path], label: str) -> list[str]:
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
    for magic, extension in MAGIC.items():
        if image.startswith(magic):
            return extension
    named = suffix_of(path or "")
    return named if named.isalnum() and named.isascii() and named not in ("cls", "json") else "bin"
