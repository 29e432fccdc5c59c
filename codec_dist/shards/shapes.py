"""The procedural source: any number of pictures of any size, whose classes are made of known parts.

Only additions, multiplications, divisions, square roots and comparisons, which are exact everywhere: the pixels are
the same on every machine.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8, UInt64
from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.location import Location
from codec_dist.shards.samples import Sample
from codec_dist.utils import derive_seed, suggestion

# Pictures are drawn together as far as this many pixels.
PIXELS_AT_ONCE = 1 << 17
SMALLEST = 4
LARGEST = 4096

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

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# How far a part's center, angle and size vary: in units of half a quarter of the image, but for the angle.
SHIFT, TURN, RADIUS = 0.14, 0.12, (0.62, 0.82)
# Grey levels.
BACKGROUND, GRADIENT, NOISE = (55.0, 125.0), 40.0, 10.0
BRIGHTNESS = (0.85, 1.1)
SHADE = 0.15
# Draws per image, beyond those for its parts and its pixels.
IMAGE_DRAWS = 8
PART_DRAWS = 5

Grid = Float32[np.ndarray, "parts half half"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
EIGHT_BIT_RGB = (8, 2, 0, 0, 0)
STORED_AT_ONCE = 65535
JPEG_QUALITY = 90


def shapes(
    count: int = 10_000, size: int = 64, classes: int = 10, image_format: str = "png", seed: int = 0
) -> tuple["Shapes", list[str]]:
    """``count`` square pictures of ``classes`` classes, and the classes' names.

    Picture i is of class i modulo ``classes``, and a function of (seed, i, size, classes) alone: it depends on neither
    how many are asked for nor in which order. Its class's parts stand in their quarters of the image, with some play in
    place, size, angle and brightness, on a ground of uneven grey; nothing else is in it. Another seed gives other
    pictures of the same classes.

    Args:
        count: number of pictures.
        size: height and width in pixels.
        classes: number of classes; :func:`shape_parts` tells their parts.
        image_format: ``png`` (uncompressed; the same bytes everywhere) or ``jpg``.
        seed: seed of the pictures.

    Raises:
        ShardError: a count, size, number of classes or format that cannot be had.
    """
    if count < 1:
        raise ShardError(f"{count} shapes were requested: at least 1 is needed")
    if not SMALLEST <= size <= LARGEST:
        raise ShardError(
            f"shapes of {size} × {size} pixels were requested: they can have {SMALLEST} to {LARGEST:,} a side"
        )
    if image_format not in ENCODERS:
        raise ShardError(f"unknown format of shapes {image_format!r}: {suggestion(image_format, ENCODERS)}")
    parts = shape_parts(classes)
    return Shapes(count, size, parts, image_format, seed), parts.class_names()


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


class Shapes:
    """Pictures that are drawn when they are asked for; many at once are cheapest. ``parts`` is their ground truth."""

    def __init__(self, count: int, size: int, parts: PartTable, image_format: str, seed: int) -> None:
        self.parts = parts
        self._count, self._size, self._format = count, size, image_format
        self._seed = np.uint64(derive_seed("shapes", seed))
        selected = [[parts.parts[number] for number in numbers] for numbers in parts.classes]
        self._kinds = np.array([[KINDS.index(part.kind) for part in each] for each in selected])
        self._colours = np.array([[list(COLOURS).index(part.colour) for part in each] for each in selected])
        self._places = np.array([[PLACES.index(part.place) for part in each] for each in selected])

    @property
    def beside(self) -> dict[str, bytes]:
        """What is to lie beside the shards, by file name: ``parts.json``, which :func:`read_parts` reads."""
        return {PARTS_FILE: self.parts.to_json()}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(self._count))

    def keys(self) -> Iterator[str]:
        return map(_key, range(self._count))

    def read(self, numbers: Sequence[int]) -> Iterator[Sample]:
        at_once = max(1, PIXELS_AT_ONCE // self._size**2)
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            for number, image in zip(some, ENCODERS[self._format](self._draw(np.array(some)))):
                yield Sample(_key(number), image, self._format, number % len(self._kinds))

    def _draw(self, numbers: np.ndarray) -> np.ndarray:
        labels = numbers % len(self._kinds)
        states = mix(self._seed ^ mix(numbers.astype(np.uint64)))
        return draw(states, self._kinds[labels], self._colours[labels], self._places[labels], self._size)


def _key(number: int) -> str:
    return f"shape-{number:08d}"


# ---- What the classes of ``shapes`` are made of: parts (kind, colour, place), and the table of parts and classes


def shape_parts(classes: int) -> PartTable:
    """The parts of ``classes`` classes, a function of their number alone.

    Each class has three parts in three of the four quarters of the image; no two classes have the same. Each quarter
    has m parts to choose from, m being the smallest number (from 2) for which at least half of the 4·m³ combinations
    stay unused. So parts are shared: each belongs to about 3/(4m) of the classes.

    Raises:
        ShardError: more classes than there are combinations for, or less than one.
    """
    if not 1 <= classes <= MOST_CLASSES:
        raise ShardError(f"{classes:,} classes of shapes were requested: there can be 1 to {MOST_CLASSES:,}")
    variants = 2
    while len(PLACES) * variants**PARTS_PER_CLASS < 2 * classes:
        variants += 1
    combinations = len(PLACES) * variants**PARTS_PER_CLASS
    selected = sorted(range(combinations), key=lambda number: derive_seed("shapes", classes, number))[:classes]
    sets = [_combination(number, variants) for number in selected]
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


# ---- Pictures of parts, many at once: each is a pure function of its own number


def draw(
    states: UInt64[np.ndarray, " batch"],
    kinds: Int[np.ndarray, "batch parts"],
    colours: Int[np.ndarray, "batch parts"],
    places: Int[np.ndarray, "batch parts"],
    size: int,
) -> UInt8[np.ndarray, "batch size size 3"]:
    """RGB pictures of coloured shapes on a grey, uneven and noisy ground.

    Args:
        states: seed of each picture.
        kinds: numbers in ``KINDS`` of each picture's parts.
        colours: numbers in ``COLOURS``.
        places: numbers in ``PLACES``; one part per place at most.
        size: height and width in pixels.
    """
    canvas = _background(states, size)
    half = (size + 1) // 2
    palette = np.array(list(COLOURS.values()), np.float32)
    batch, parts = kinds.shape
    draws = _uniform(states[:, None], IMAGE_DRAWS + np.arange(PART_DRAWS * parts)).reshape(batch * parts, PART_DRAWS)
    cover, shade = _cover(kinds.reshape(-1), draws, half)
    low, high = BRIGHTNESS
    ink = palette[colours.reshape(-1)] * (low + (high - low) * draws[:, 4:5])
    image_of = np.repeat(np.arange(batch), parts)
    for place in range(len(PLACES)):
        here = places.reshape(-1) == place
        top, left = ((size - half) * number for number in divmod(place, 2))
        quarter = (image_of[here], slice(top, top + half), slice(left, left + half))
        weight = cover[here, :, :, None]
        painted = ink[here, None, None, :] * shade[here, :, :, None]
        canvas[quarter] += weight * (painted - canvas[quarter])
    canvas += _noise(states, size)[..., None]
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def mix(values: UInt64[np.ndarray, "*any"]) -> UInt64[np.ndarray, "*any"]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers to unrelated ones."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniform(states: UInt64[np.ndarray, "batch 1"], draws: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) with 24 bits, one column per draw."""
    bits = mix(states + GOLDEN * (np.asarray(draws, np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _background(states: UInt64[np.ndarray, " batch"], size: int) -> Float32[np.ndarray, "batch size size 3"]:
    draws = _uniform(states[:, None], range(IMAGE_DRAWS))
    low, high = BACKGROUND
    grey = low + (high - low) * draws[:, 0:1] + 12 * (draws[:, 3:6] - np.float32(0.5))
    ramp = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    slopes = GRADIENT * (2 * draws[:, 1:3] - 1)
    across, down = slopes[:, 0, None, None] * ramp, slopes[:, 1, None, None] * ramp[:, None]
    return (across + down)[..., None] + grey[:, None, None, :]


def _noise(states: UInt64[np.ndarray, " batch"], size: int) -> Float32[np.ndarray, "batch size size"]:
    # One hash serves eight pixels.
    words = mix(mix(states)[:, None] + GOLDEN * np.arange((size * size + 7) // 8, dtype=np.uint64))
    levels = words.astype("<u8").view(np.uint8)[:, : size * size].reshape(-1, size, size)
    return (levels.astype(np.float32) - np.float32(127.5)) * np.float32(NOISE / 127.5)


def _cover(kinds: Int[np.ndarray, " parts"], draws: np.ndarray, half: int) -> tuple[Grid, Grid]:
    """How much of each pixel of its quarter each part covers, and how bright it is there."""
    low, high = RADIUS
    radius = low + (high - low) * draws[:, 3, None, None]
    grid = ((2 * np.arange(half, dtype=np.float32) + 1) / np.float32(half) - 1).astype(np.float32)
    x = grid[None, None, :] - SHIFT * (2 * draws[:, 0, None, None] - 1)
    y = grid[None, :, None] - SHIFT * (2 * draws[:, 1, None, None] - 1)
    # A rotation by the tangent of half its angle needs no sine.
    turn = TURN * (2 * draws[:, 2, None, None] - 1)
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    across, down = (cosine * x + sine * y) / radius, (cosine * y - sine * x) / radius
    distance = np.empty_like(across)
    for number, kind in enumerate(KINDS):
        here = kinds == number
        distance[here] = DISTANCES[kind](across[here], down[here])
    pixels = radius * np.float32(half / 2)
    cover = np.clip(np.float32(0.5) - distance * pixels, 0, 1)
    return cover.astype(np.float32), (1 - SHADE * (across + down)).astype(np.float32)


def _disc(x: Grid, y: Grid) -> Grid:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Grid, y: Grid) -> Grid:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86)


def _triangle(x: Grid, y: Grid) -> Grid:
    side = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(y - np.float32(0.62), side - np.float32(0.5))


def _ring(x: Grid, y: Grid) -> Grid:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.74)) - np.float32(0.26)


def _cross(x: Grid, y: Grid) -> Grid:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - np.float32(0.34))


def _diamond(x: Grid, y: Grid) -> Grid:
    return (np.abs(x) + np.abs(y) - np.float32(1.1)) * np.float32(0.70710677)


# Signed distances to the outline, in units of the part's radius; y points down.
DISTANCES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
}


# ---- Images to bytes: PNG without compression, whose bytes depend on the pixels alone, and JPEG


def encode_png(images: UInt8[np.ndarray, "batch height width 3"]) -> Iterator[bytes]:
    """RGB images as PNG (RFC 2083) with stored blocks (RFC 1951): the same bytes whatever the version of zlib.

    Several times faster than Pillow for small images.
    """
    batch, height, width, _ = images.shape
    rows = np.zeros((batch, height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
    rows[:, :, 1:] = images.reshape(batch, height, 3 * width)
    content, size = rows.tobytes(), height * (1 + 3 * width)
    starts = range(0, size, STORED_AT_ONCE)
    heads = [_block_head(min(STORED_AT_ONCE, size - start), start + STORED_AT_ONCE >= size) for start in starts]
    before = SIGNATURE + _chunk(b"IHDR", struct.pack(">II5B", width, height, *EIGHT_BIT_RGB))
    before += struct.pack(">I", 2 + 5 * len(heads) + size + 4)
    end = _chunk(b"IEND", b"")
    for offset in range(0, len(content), size):
        pieces = [b"IDAT\x78\x01"]
        for start, head in zip(starts, heads):
            pieces += head, content[offset + start : offset + min(start + STORED_AT_ONCE, size)]
        data = b"".join((*pieces, zlib.adler32(content[offset : offset + size]).to_bytes(4, "big")))
        yield b"".join((before, data, zlib.crc32(data).to_bytes(4, "big"), end))


def encode_jpeg(images: UInt8[np.ndarray, "batch height width 3"]) -> Iterator[bytes]:
    """RGB images as JPEG of quality 90; the bytes may differ between versions of the JPEG library."""
    for image in images:
        content = io.BytesIO()
        Image.fromarray(image).save(content, format="JPEG", quality=JPEG_QUALITY)
        yield content.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _block_head(size: int, last: bool) -> bytes:
    return struct.pack("<BHH", last, size, size ^ 0xFFFF)


ENCODERS: dict[str, Callable[[UInt8[np.ndarray, "batch height width 3"]], Iterator[bytes]]] = {
    "png": encode_png,
    "jpg": encode_jpeg,
}
