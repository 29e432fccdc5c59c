"""Files that list classes, in the forms in which people have them, as rows of names."""

import ast
import csv
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from codec_dist.shards.errors import ShardError

# Under these keys class lists stand in settings of models and data sets (Hugging Face, timm, Ultralytics, COCO).
NESTED = ("id2label", "label2id", "label_names", "class_names", "classes", "names", "class_to_idx", "idx_to_class",
          "categories")  # fmt: skip
HEADERS = {"index", "idx", "id", "label", "labels", "class", "classes", "classid", "class_id", "class_name",
           "class_names", "classname", "name", "names", "label_name", "label_id", "wnid", "synset", "synset_id",
           "wordnet_id", "category", "category_id", "category_name", "categories", "species", "breed", "title",
           "description", "synonyms"}  # fmt: skip
# Keys of objects that describe one class each: its number, and its name.
NUMBER_KEYS = ("index", "idx", "id", "label", "class_id", "label_id", "category_id", "class_index", "trainid")
NAME_KEYS = ("name", "class_name", "label_name", "category_name", "display_name", "label", "class")
INTEGER = re.compile(r"[0-9]{1,9}")
WORDNET_ID = re.compile(r"n[0-9]{8}")
# A line's parts: a number or an id that stands first, or a number that stands last.
BETWEEN = r"[\s:,;.)=|]+"
FIRST_NUMBER = re.compile(rf"([0-9]{{1,9}}){BETWEEN}(.*\S)")
LAST_NUMBER = re.compile(r"(.*[^\s:,;=|])[\s:,;=|]+([0-9]{1,9})")
FIRST_ID = re.compile(r"(n[0-9]{8})[\s:,;]+(.*\S)")


def read_class_rows(text: str, suffix: str, source: str) -> list[list[str]]:
    """The names of each class, by the number of the class.

    Args:
        text: the file's content.
        suffix: ``.json``, ``.yaml``, ``.yml``, ``.csv``, ``.tsv`` or any other for text; what looks like JSON is read
            as that.
        source: the file, for messages.

    Raises:
        ShardError: it is not of the form that its suffix says, numbers of classes are missing or occur twice, or an
            empty line between names may stand for a class.
    """
    if suffix in (".yaml", ".yml"):
        return _from_values(_parse_yaml(text, source), source)
    if suffix == ".json" or text.lstrip()[:1] in ("{", "["):
        return _from_values(_parse(text, source), source)
    if suffix in (".csv", ".tsv"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        rows = _from_table(lines, "\t" if suffix == ".tsv" else _delimiter(lines), source)
    else:
        rows = _from_lines([line.strip() for line in text.strip().splitlines()], source)
    # The only line lists several classes, where it lists several names.
    return [[cell.strip()] for cell in ",".join(rows[0]).split(",")] if len(rows) == 1 else rows


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ShardError(f"the classes in {source} are not YAML: {' '.join(str(error).split())}") from error


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())  # lists of ImageNet's classes go around as Python dicts
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ShardError(f"the classes in {source} are not JSON: {error}") from error


def _from_values(values: Any, source: str) -> list[list[str]]:
    if isinstance(values, Mapping):
        nested = next((values[key] for key in NESTED if isinstance(values.get(key), Mapping | list)), None)
        if nested is not None:
            return _from_values(nested, source)
        if all(map(_is_number, values.values())) and not all(map(_is_number, values)):
            return _in_order([(int(number), [str(name)]) for name, number in values.items()], source)
        if not all(map(_is_number, values)):
            raise ShardError(f"{source} lists no classes: expected an object from numbers to names, or the reverse")
        return _in_order([(int(number), _names(each)) for number, each in values.items()], source)
    if not isinstance(values, list):
        raise ShardError(f"{source} lists no classes: expected a list or an object")
    if values and all(isinstance(each, Mapping) for each in values):
        return _from_objects(values, source)
    return [_names(each) for each in values]


def _from_objects(objects: Sequence[Mapping[str, Any]], source: str) -> list[list[str]]:
    """Objects that describe one class each, by their numbers if they have any."""
    plain = [{str(key).lower(): value for key, value in each.items()} for each in objects]
    for key in NUMBER_KEYS:
        if all(key in each and _is_number(each[key]) for each in plain):
            rest = [{name: value for name, value in each.items() if name != key} for each in plain]
            return _in_order([(int(each[key]), _names(other)) for each, other in zip(plain, rest)], source)
    return [_names(each) for each in plain]


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        first = sorted(value, key=lambda key: NAME_KEYS.index(key) if key in NAME_KEYS else len(NAME_KEYS))
        value = [value[key] for key in first]
    values = value if isinstance(value, list | tuple) else [value]
    return [str(each).strip() for each in values if isinstance(each, str | int) and str(each).strip()]


def _from_table(lines: Sequence[str], delimiter: str, source: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    if len(rows) > 1 and _is_header(rows[0], rows[1:]):
        rows = rows[1:]
    if min(map(len, rows), default=0) > 1:
        for body in (rows, rows[1:]):
            for column in range(min(map(len, body), default=0)):
                if all(_is_number(row[column]) for row in body):
                    return _in_order([(int(row[column]), row[:column] + row[column + 1 :]) for row in body], source)
    return [[cell for cell in row if cell] for row in rows]


def _is_header(first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Whether the first row of a table names its columns: by its words, or by a column that is of another kind."""
    if all(not cell or cell.casefold() in HEADERS for cell in first):
        return True
    for form, is_kind in ((WORDNET_ID.fullmatch, True), (INTEGER.fullmatch, False)):
        for column in range(min(map(len, [first, *rest]))):
            below = [bool(form(row[column])) for row in rest]
            # Ids below a word, or a number (as pandas calls a column without name) above words.
            if bool(form(first[column])) != is_kind and (all(below) if is_kind else not any(below)):
                return True
    return False


def _from_lines(lines: Sequence[str], source: str) -> list[list[str]]:
    full = [line for line in lines if line and not line.startswith("#")]
    for pattern, number, name in ((FIRST_NUMBER, 1, 2), (LAST_NUMBER, 2, 1)):
        matches = [pattern.fullmatch(line) for line in full]
        found = [(int(match[number]), match[name], line) for match, line in zip(matches, full) if match]
        distinct = len({name for _, name, _ in found}) == len(full)
        if len(found) == len(full) and distinct and _counts({each for each, _, _ in found}, len(full)):
            # The number may be a part of the name, as in the folders of CUB-200.
            return [[*_id_and_name(name), line] for _, name, line in sorted(found)]
    names = [line for line in lines if not line.startswith("#")]
    if "" in names:
        raise ShardError(
            f"line {lines.index('') + 1} of {source} is empty, and may stand for a class: remove it, or name the class"
        )
    return [_id_and_name(line) for line in names]


def _id_and_name(line: str) -> list[str]:
    return [*match.groups()] if (match := FIRST_ID.fullmatch(line)) else [line]


def _in_order(numbered: Sequence[tuple[int, list[str]]], source: str) -> list[list[str]]:
    numbers = {number for number, _ in numbered}
    if not _counts(numbers, len(numbered)):
        raise ShardError(
            f"the numbers of the {len(numbered):,} classes in {source} do not count from 0 to {len(numbered) - 1}: "
            f"found {min(numbers, default=0)} to {max(numbers, default=0)}, {len(numbers):,} different ones"
        )
    return [[cell for cell in names if cell] for _, names in sorted(numbered, key=_first)]


def _first(numbered: tuple[int, list[str]]) -> int:
    return numbered[0]


def _counts(numbers: set[int], count: int) -> bool:
    return any(numbers == set(range(start, start + count)) for start in (0, 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or bool(INTEGER.fullmatch(str(value).strip()))


def _delimiter(lines: Sequence[str]) -> str:
    return next((each for each in "\t;" if all(each in line for line in lines)), ",")
