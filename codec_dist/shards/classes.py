"""Class names beside the shards: ``classes.json``, a list by label."""

import json
from collections.abc import Sequence

from codec_dist.shards.errors import ShardError
from codec_dist.shards.location import Location

CLASSES_FILE = "classes.json"


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
