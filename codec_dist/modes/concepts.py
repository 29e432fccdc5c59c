"""Concepts: named sets of classes, such as WordNet superclasses."""

import json
from collections.abc import Mapping, Sequence
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
        ModesError: an unknown class (with the nearest names), or a concept without classes.
    """
    index = {name: number for number, name in enumerate(class_names)}
    return {name: _members(name, members, index) for name, members in concepts.items()}


def _members(concept: str, members: Sequence[Any], index: Mapping[str, int]) -> tuple[int, ...]:
    if not members:
        raise ModesError(f"the concept {concept!r} lists no class: give it some or remove it")
    return tuple(sorted({_class_index(concept, member, index) for member in members}))


def _class_index(concept: str, member: Any, index: Mapping[str, int]) -> int:
    if isinstance(member, str):
        if member not in index:
            raise ModesError(f"the concept {concept!r} lists the unknown class {member!r}: {suggestion(member, index)}")
        return index[member]
    if not isinstance(member, int) or isinstance(member, bool) or not 0 <= member < len(index):
        raise ModesError(
            f"the concept {concept!r} lists {member!r}: classes are names, or numbers from 0 to {len(index) - 1}"
        )
    return member
