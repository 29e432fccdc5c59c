"""Concepts: named sets of classes, such as WordNet superclasses."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codec_dist.modes.errors import ModesError
from codec_dist.utils import read_json, suggestion


def load_concepts(path: Path, class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read a JSON file ``{concept: [class names or indices]}``; see :func:`parse_concepts`.

    Raises:
        ModesError: no such file, no JSON, or a class that does not exist.
    """
    try:
        value = read_json(Path(path))
    except FileNotFoundError as error:
        raise ModesError(f"there is no concepts file {path}: set modes.concepts to a JSON file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModesError(f"the concepts file {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(members, list) for members in value.values()):
        raise ModesError(f"the concepts file {path} must hold {{concept: [class names or indices]}}")
    return parse_concepts(value, class_names)


def parse_concepts(concepts: Mapping[str, Sequence[Any]], class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Concepts as ascending class indices, each class once (METHOD §5).

    Of the members, as read from JSON, a text is a class name and a number a class index.

    Raises:
        ModesError: an unknown class (with the nearest names), a name that several classes have, or a
            concept without classes.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(class_names):
        numbers.setdefault(name, []).append(number)
    return {name: _members(name, members, numbers, len(class_names)) for name, members in concepts.items()}


def class_index(name: str, class_names: Sequence[str]) -> int:
    """The index of the one class of this name.

    Raises:
        ModesError: no class has it (with the nearest names), or several have.
    """
    return _only(name, [number for number, each in enumerate(class_names) if each == name], class_names)


def _members(concept: str, members: Sequence[Any], numbers: Mapping[str, list[int]], classes: int) -> tuple[int, ...]:
    if not members:
        raise ModesError(f"the concept {concept!r} lists no class: give it some or remove it")
    return tuple(sorted({_member(concept, member, numbers, classes) for member in members}))


def _member(concept: str, member: Any, numbers: Mapping[str, list[int]], classes: int) -> int:
    if isinstance(member, str):
        return _only(member, numbers.get(member, []), numbers, f"the concept {concept!r} lists the ")
    if not isinstance(member, int) or isinstance(member, bool) or not 0 <= member < classes:
        raise ModesError(
            f"the concept {concept!r} lists {member!r}: classes are names, or numbers from 0 to {classes - 1}"
        )
    return member


def _only(name: str, found: Sequence[int], names: Iterable[str], where: str = "") -> int:
    if not found:
        raise ModesError(f"{where}unknown class {name!r}: {suggestion(name, names)}")
    if len(found) > 1:
        indices = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
        raise ModesError(f"{where}ambiguous class {name!r}: classes {indices} have this name; give the number instead")
    return found[0]
