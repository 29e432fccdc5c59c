"""What the classes of ``shapes`` are made of: parts (kind, colour, place), and the table of parts and classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from codec_dist.shards.errors import ShardError
from codec_dist.shards.location import Location
from codec_dist.utils import derive_seed

PARTS_FILE = "parts.json"
KINDS = ("disc", "square", "triangle", "ring", "cross", "diamond")
COLOURS = {
    "red": (225, 55, 45),
    "green": (60, 185, 75),
    "blue": (65, 105, 235),
    "yellow": (240, 215, 50),
    "magenta": (215, 65, 205),
    "cyan": (60, 205, 220),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
PARTS_PER_CLASS = 3
MOST_CLASSES = len(PLACES) * (len(KINDS) * len(COLOURS)) ** PARTS_PER_CLASS // 2


@dataclass(frozen=True)
class Part:
    """A coloured shape in one quarter of the image."""

    kind: str
    colour: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind} {self.place}"


@dataclass(frozen=True)
class PartTable:
    """Which parts make up which class."""

    parts: tuple[Part, ...]
    classes: tuple[tuple[int, ...], ...]
    """Numbers of the parts of each class, by label."""

    def table(self) -> Bool[np.ndarray, "parts classes"]:
        """True where a class has a part."""
        table = np.zeros((len(self.parts), len(self.classes)), dtype=bool)
        for label, parts in enumerate(self.classes):
            table[list(parts), label] = True
        return table

    def class_names(self) -> list[str]:
        """Names by label: those of the parts."""
        return [", ".join(self.parts[part].name for part in parts) for parts in self.classes]

    def to_json(self) -> bytes:
        """The content of ``parts.json``."""
        value = {"parts": [vars(part) | {"name": part.name} for part in self.parts], "classes": self.classes}
        return (json.dumps(value, indent=1) + "\n").encode()


def shape_parts(classes: int) -> PartTable:
    """The parts of ``classes`` classes, a function of their number alone.

    Each class has three parts in three of the four quarters of the image; no two classes have the same. Each quarter
    has m parts to choose from, m being the smallest number (from 2) for which at least half of the 4·m³ combinations
    stay unused. So parts are shared: each belongs to about 3/(4m) of the classes.

    Raises:
        ShardError: more classes than there are combinations for, or less than one.
    """
    if not 1 <= classes <= MOST_CLASSES:
        raise ShardError(f"{classes:,} classes of shapes were asked: there can be 1 to {MOST_CLASSES:,}")
    variants = 2
    while len(PLACES) * variants**PARTS_PER_CLASS < 2 * classes:
        variants += 1
    combinations = len(PLACES) * variants**PARTS_PER_CLASS
    chosen = sorted(range(combinations), key=lambda number: derive_seed("shapes", classes, number))[:classes]
    sets = [_combination(number, variants) for number in chosen]
    used = sorted({part for parts in sets for part in parts})
    numbers = {part: number for number, part in enumerate(used)}
    return PartTable(
        tuple(_part(place, variant) for place, variant in used),
        tuple(tuple(numbers[part] for part in parts) for parts in sets),
    )


def read_parts(location: str | Path | Location) -> PartTable | None:
    """The table that was packed with a folder of shapes, None if there is none.

    Raises:
        ShardError: the file is not such a table.
    """
    place = location if isinstance(location, Location) else Location(location)
    content = place.read(PARTS_FILE)
    if content is None:
        return None
    try:
        value: Any = json.loads(content)
        parts = tuple(Part(part["kind"], part["colour"], part["place"]) for part in value["parts"])
        table = PartTable(parts, tuple(tuple(map(int, numbers)) for numbers in value["classes"]))
        table.table()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ShardError(f"{place.path(PARTS_FILE)} is no table of parts: {type(error).__name__}: {error}") from error
    return table


def _combination(number: int, variants: int) -> list[tuple[int, int]]:
    """(place, variant) of each part: one place is empty, the others have one variant each."""
    number, empty = divmod(number, len(PLACES))
    parts = []
    for place in range(len(PLACES)):
        if place != empty:
            number, variant = divmod(number, variants)
            parts.append((place, variant))
    return parts


def _part(place: int, variant: int) -> Part:
    # Neighbouring variants differ in kind and colour; all 36 differ.
    kind = (variant + place) % len(KINDS)
    colour = (variant + variant // len(KINDS) + 2 * place) % len(COLOURS)
    return Part(KINDS[kind], list(COLOURS)[colour], PLACES[place])
