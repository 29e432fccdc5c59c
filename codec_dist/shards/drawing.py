"""Pictures of parts, many at once: each is a pure function of its own number.

Only additions, multiplications, divisions, square roots and comparisons, which are exact everywhere: the pixels are
the same on every machine.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int, UInt8, UInt64

from codec_dist.shards.parts import COLOURS, KINDS, PLACES

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
