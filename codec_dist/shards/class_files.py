"""Files that list classes, in the forms in which people have them, as rows of names."""

import ast
import csv
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from codec_dist.shards.errors import ShardError

# Under these keys class lists stand in settings of models (Hugging Face, timm).
NESTED = ("id2label", "label2id", "label_names", "class_names", "classes", "names")
HEADERS = {"index", "idx", "id", "label", "labels", "class", "class_id", "class_name", "classname", "name", "names",
           "wnid", "synset", "wordnet_id", "category", "description", "synonyms"}  # fmt: skip
INTEGER = re.compile(r"[0-9]{1,9}")
# A line's parts: a number or an id that stands first, or a number that stands last.
FIRST_NUMBER, LAST_NUMBER = re.compile(r"([0-9]{1,9})[\s:,;]+(.*\S)"), re.compile(r"(.*\S)[\s:,;]+([0-9]{1,9})")
FIRST_ID = re.compile(r"(n[0-9]{8})[\s:,;]+(.*\S)")


def read_class_rows(text: str, suffix: str, source: str) -> list[list[str]]:
    """The names of each class, by the number of the class.

    Args:
        text: the file's content.
        suffix: ``.json``, ``.csv``, ``.tsv`` or any other for text; what looks like JSON is read as that.
        source: the file, for messages.

    Raises:
        ShardError: it is not of the form that its suffix says, or numbers of classes are missing or occur twice.
    """
    if suffix == ".json" or text.lstrip()[:1] in ("{", "["):
        return _from_values(_parse(text, source), source)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if suffix in (".csv", ".tsv"):
        return _from_table(lines, "\t" if suffix == ".tsv" else _delimiter(lines), source)
    return _from_lines(lines)


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
        if all(isinstance(each, int) for each in values.values()) and not all(map(_is_number, values)):
            return _in_order([(number, [str(name)]) for name, number in values.items()], source)
        if not all(map(_is_number, values)):
            raise ShardError(f"{source} lists no classes: expected an object from numbers to names, or the reverse")
        return _in_order([(int(number), _names(each)) for number, each in values.items()], source)
    if not isinstance(values, list):
        raise ShardError(f"{source} lists no classes: expected a JSON list or object")
    return [_names(each) for each in values]


def _names(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    values = value if isinstance(value, list | tuple) else [value]
    return [str(each).strip() for each in values if isinstance(each, str | int) and str(each).strip()]


def _from_table(lines: Sequence[str], delimiter: str, source: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    if rows and all(not cell or cell.casefold() in HEADERS for cell in rows[0]):
        rows = rows[1:]
    if min(map(len, rows), default=0) > 1:
        for body in (rows, rows[1:]):
            for column in range(min(map(len, body), default=0)):
                if all(_is_number(row[column]) for row in body):
                    return _in_order([(int(row[column]), row[:column] + row[column + 1 :]) for row in body], source)
    return [[cell for cell in row if cell] for row in rows]


def _from_lines(lines: Sequence[str]) -> list[list[str]]:
    for pattern, number, name in ((FIRST_NUMBER, 1, 2), (LAST_NUMBER, 2, 1)):
        matches = [pattern.fullmatch(line) for line in lines]
        found = [(int(match[number]), match[name]) for match in matches if match]
        if len(found) == len(lines) and _counts({each for each, _ in found}, len(lines)):
            lines = [line for _, line in sorted(found)]
            break
    return [[*match.groups()] if (match := FIRST_ID.fullmatch(line)) else [line] for line in lines]


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
