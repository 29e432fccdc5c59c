"""Lists of a model's classes in the order of its outputs, and the labels that names of folders have in them."""

import csv
import functools
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from codec_dist.shards.class_files import read_class_rows
from codec_dist.shards.errors import ShardError
from codec_dist.shards.tally import shown
from codec_dist.utils import suggestion

IMAGENET = "imagenet"
WORDNET_ID = re.compile(r"n\d{8}")
INTEGER = re.compile(r"\d{1,9}", re.ASCII)
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
NAMED = 3


@dataclass(frozen=True)
class ClassList:
    """The classes of a model, by the numbers of its outputs."""

    source: str
    """Where the list comes from, for messages."""
    names: tuple[str, ...]
    """One name per class, for people."""
    known_as: tuple[tuple[str, ...], ...]
    """Ids and names of each class, as they stand in the list."""
    synonyms: tuple[tuple[str, ...], ...]
    """Further names of each class, which count where no class is known by a name."""

    def __len__(self) -> int:
        return len(self.names)


def read_class_list(source: str | Path) -> ClassList:
    """A list of classes from a file, or ``imagenet``.

    Read are JSON and YAML (a list of names, of [id, name], or of objects with a number and a name; an object from
    numbers to names, or from names to numbers; also under ``id2label``, ``label2id`` or ``names`` of settings), CSV
    with or without a header, and text with one class per line. In CSV and text a column that counts from 0 or 1 is the
    number of the class; a line may begin with a WordNet id; synonyms follow after commas; lines of text that begin with
    # are comments.

    Raises:
        ShardError: no such file, or no list of classes in it.
    """
    if str(source) == IMAGENET:
        return _imagenet()
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"cannot read classes from {path}: {error.strerror}; give a file, or `imagenet`") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"the classes in {path} are not UTF-8 text: {error.reason}") from error
    rows = read_class_rows(text, path.suffix.lower(), str(path))
    if not rows or not all(row and all(row) for row in rows):
        raise ShardError(f"{path} lists no classes: expected names or WordNet ids in the order of the model's outputs")
    return _class_list(str(path), rows)


def match_classes(found: Sequence[str], classes: ClassList, what: str) -> tuple[dict[str, int], list[str]]:
    """The label of each name that was found, and notes on how it was matched.

    Names match ids and names of the list; where none is the same, upper and lower case, spaces, ``_`` and ``-`` do not
    count. Names that are all numbers, of which none is in the list, are the numbers of the classes.

    Args:
        found: names of folders, or texts of labels.
        classes: the list.
        what: ``folder`` or ``label``, for messages.

    Raises:
        ShardError: names that match nothing, or several classes.
    """
    exact, loose = _places(classes.known_as, str), _places(classes.known_as, _plain)
    synonyms = _places(classes.synonyms, _plain)
    places = {name: exact.get(name) or loose.get(_plain(name)) or synonyms.get(_plain(name)) or [] for name in found}
    notes = []
    if found and not any(places.values()) and all(INTEGER.fullmatch(name) for name in found):
        notes.append(f"the names of {what}s are numbers, and taken as numbers of classes in {classes.source}")
        places = {name: [int(name)] if int(name) < len(classes) else [] for name in found}
    unknown = [name for name in found if not places[name]]
    if unknown:
        first = unknown[0]
        known = {each for names in (*classes.known_as, *classes.synonyms) for each in names}
        near = f"the classes are numbered 0 to {len(classes) - 1}" if notes else suggestion(first, known)
        raise ShardError(
            f"{len(unknown):,} of {len(found):,} {what}s are no class in {classes.source}, first {shown(first)!r}: "
            f"{near}"
        )
    for name, meant in places.items():
        if len(meant) > 1:
            which = " or ".join(f"{number} ({', '.join(classes.known_as[number][:2])})" for number in meant[:NAMED])
            raise ShardError(f"the {what} {shown(name)!r} may be class {which} in {classes.source}: name it by its id")
    labels = {name: meant[0] for name, meant in places.items()}
    shared = [label for label, count in Counter(labels.values()).items() if count > 1]
    notes += [
        f"the {what}s {', '.join(shown(name) for name in found if labels[name] == label)} are one class, {label}"
        for label in sorted(shared)
    ]
    return labels, notes


def ordered_names(found: Iterable[str], what: str) -> tuple[list[str], list[str]]:
    """Names in the order in which they are numbered without a list of classes, and notes on what may be wrong with it.

    Names that are all numbers are in the order of the numbers, others in that of their characters, as in torchvision.
    """
    names = sorted(found)
    if names and all(INTEGER.fullmatch(name) for name in names):
        names.sort(key=lambda name: (int(name), name))
        if [int(name) for name in names] == list(range(len(names))):
            return names, [f"the {what}s are named by numbers, which are the labels"]
        return names, [
            f"the {what}s are named by numbers and labelled 0 to {len(names) - 1} in their order ({what} {names[0]} "
            f"has the label 0, {what} {names[-1]} the label {len(names) - 1}): if they are numbers of a model's "
            "outputs, pack with --classes FILE"
        ]
    return names, [*label_warnings(names, what), *_order_notes(names, what)]


def _order_notes(names: Sequence[str], what: str) -> list[str]:
    """Notes on an order in which people may not expect the names, and on a single class."""
    if len(names) == 1:
        return [f"all is in one {what}, {shown(names[0])}, and has the label 0"]
    for label, (name, following) in enumerate(pairwise(names)):
        if _larger_number_first(name, following):
            return [
                f"the {what}s are numbered in the order of their characters, so that {shown(name)} (label {label}) "
                f"comes before {shown(following)} (label {label + 1}): if the model's outputs are in another order, "
                "pack with --classes FILE"
            ]
    return []


def _larger_number_first(name: str, following: str) -> bool:
    """Whether names first differ in a number, which is the larger in the first: ``class_10``, ``class_2``."""
    parts = (re.findall(r"[0-9]+|[^0-9]+", each) for each in (name, following))
    for left, right in zip(*parts):
        if left != right:
            return bool(INTEGER.fullmatch(left) and INTEGER.fullmatch(right)) and int(left) > int(right)
    return False


def label_warnings(names: Sequence[str], what: str) -> list[str]:
    """Notes on names of classes that are likely to be labelled otherwise than the model's outputs."""
    if names and {name.lower() for name in names} <= SPLITS:
        return [
            f"the {what}s {', '.join(names)} look like parts of a data set, but are taken for classes: pack each alone"
        ]
    if not names or not all(WORDNET_ID.fullmatch(name) for name in names):
        return []
    imagenet = {known[0] for known in read_class_list(IMAGENET).known_as}
    if set(names) == imagenet:
        return []
    inside = len(imagenet.intersection(names))
    return [
        f"the {what}s are WordNet ids ({inside:,} of ImageNet's 1,000 classes) and labelled 0 to {len(names) - 1}: "
        "for a model with ImageNet's 1,000 outputs pack with --classes imagenet"
    ]


@functools.cache
def _imagenet() -> ClassList:
    file = files("codec_dist.shards") / "packaged" / "imagenet_classes.csv"
    rows = csv.reader(io.StringIO(file.read_text(encoding="utf-8")))
    return _class_list("ImageNet's 1,000 classes", list(rows))


def _class_list(source: str, rows: Sequence[Sequence[str]]) -> ClassList:
    names = tuple(next((each for each in row if not WORDNET_ID.fullmatch(each)), row[0]) for row in rows)
    parts = [[[part.strip() for part in each.split(",")] for each in row] for row in rows]
    known_as = tuple(
        tuple(dict.fromkeys([*row, *(part[0] for part in split if part[0])])) for row, split in zip(rows, parts)
    )
    synonyms = tuple(tuple(each for part in split for each in part[1:] if each) for split in parts)
    return ClassList(source, names, known_as, synonyms)


def _places(names: Sequence[tuple[str, ...]], form: Callable[[str], str]) -> dict[str, list[int]]:
    """Numbers of the classes by the form of their names."""
    found: dict[str, list[int]] = {}
    for number, known in enumerate(names):
        for name in {form(each) for each in known}:
            found.setdefault(name, []).append(number)
    return found


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold())).strip()
