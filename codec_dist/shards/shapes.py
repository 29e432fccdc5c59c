"""The procedural source: any number of pictures of any size, whose classes are made of known parts."""

from collections.abc import Iterator, Sequence

import numpy as np

from codec_dist.shards.drawing import draw, mix
from codec_dist.shards.encoding import ENCODERS
from codec_dist.shards.errors import ShardError
from codec_dist.shards.parts import COLOURS, KINDS, PLACES, PartTable, shape_parts
from codec_dist.shards.samples import Sample
from codec_dist.utils import derive_seed, suggestion

# Pictures are drawn together as far as this many pixels.
PIXELS_AT_ONCE = 1 << 17
SMALLEST = 4
LARGEST = 4096


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
        raise ShardError(f"{count} shapes were asked: at least 1 is needed")
    if not SMALLEST <= size <= LARGEST:
        raise ShardError(f"shapes of {size} × {size} pixels were asked: they can have {SMALLEST} to {LARGEST:,} a side")
    if image_format not in ENCODERS:
        raise ShardError(f"unknown format of shapes {image_format!r}: {suggestion(image_format, ENCODERS)}")
    parts = shape_parts(classes)
    return Shapes(count, size, parts, image_format, seed), parts.class_names()


class Shapes:
    """Pictures that are drawn when they are asked for; many at once are cheapest. ``parts`` is their ground truth."""

    def __init__(self, count: int, size: int, parts: PartTable, image_format: str, seed: int) -> None:
        self.parts = parts
        self._count, self._size, self._format = count, size, image_format
        self._seed = np.uint64(derive_seed("shapes", seed))
        chosen = [[parts.parts[number] for number in numbers] for numbers in parts.classes]
        self._kinds = np.array([[KINDS.index(part.kind) for part in each] for each in chosen])
        self._colours = np.array([[list(COLOURS).index(part.colour) for part in each] for each in chosen])
        self._places = np.array([[PLACES.index(part.place) for part in each] for each in chosen])

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
