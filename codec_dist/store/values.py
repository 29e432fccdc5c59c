"""Checks on the numbers that go into a block, and their checksums, in one pass over them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codec_dist.store.checksums import RunningChecksum
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import Layout

PIECE_VALUES = 64 * 1024


class Prepared(NamedTuple):
    """The valid rows of one array of a shard."""

    values: np.ndarray
    """[rows, channels] in the stored type, in C order."""
    checksums: list[str]
    """Of the rows of each chunk."""


def prepare_values(layout: Layout, name: tuple[str, str], values: np.ndarray, keys: Sequence[str]) -> Prepared:
    """``values`` [rows, channels] as they are stored.

    Raises:
        StoreError: another shape, a value that is not finite, that overflows the stored type, or whose sign
            is not the quantity's; layer, channel and sample are named.
    """
    layer, quantity = name
    values = np.asarray(values)
    expected = (len(keys), layout.channels(layer))
    if values.shape != expected:
        raise StoreError(
            f"{quantity} of layer {layer!r} has shape {list(values.shape)}, "
            f"expected {list(expected)} ({expected[0]} samples, {expected[1]} channels)"
        )
    if values.dtype.kind != "f":
        raise StoreError(f"{quantity} of layer {layer!r} has type {values.dtype}: expected floating-point numbers")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=np.dtype(layout.dtype).newbyteorder("<"))
    if stored.size == 0:
        return Prepared(stored, [])
    low, high, checksums = _look_through(stored, layout.chunk_rows)
    if not np.isfinite(low) or not np.isfinite(high):
        row, channel = np.argwhere(~np.isfinite(stored))[0]
        _refuse(layout, name, values, (int(row), int(channel)), keys)
    sign = layout.quantities[quantity].sign
    if (sign == "positive" and low < 0) or (sign == "negative" and high > 0):
        row, channel = np.argwhere(stored < 0 if sign == "positive" else stored > 0)[0]
        raise StoreError(
            f"{quantity} of layer {layer!r} is {values[row, channel]:g} in channel {channel} of sample {keys[row]!r}: "
            f"the {sign} part must be {'≥' if sign == 'positive' else '≤'} 0"
        )
    return Prepared(stored, checksums)


def _look_through(stored: np.ndarray, chunk_rows: int) -> tuple[float, float, list[str]]:
    """Minimum, maximum (both NaN if any value is) and the checksum of each chunk's rows.

    In pieces that stay in the processor's cache from the first look to the third: memory is read once.
    """
    extremes, checksums = [], []
    for first in range(0, len(stored), chunk_rows):
        chunk, running = stored[first : first + chunk_rows].reshape(-1), RunningChecksum()
        for start in range(0, chunk.size, PIECE_VALUES):
            piece = chunk[start : start + PIECE_VALUES]
            extremes.append((piece.min(), piece.max()))
            running.update(piece.view(np.uint8))
        checksums.append(running.result())
    low, high = np.array(extremes).T
    return low.min(), high.max(), checksums


def _refuse(
    layout: Layout, name: tuple[str, str], values: np.ndarray, where: tuple[int, int], keys: Sequence[str]
) -> None:
    layer, quantity = name
    value = values[where]
    place = f"{quantity} of layer {layer!r} in channel {where[1]} of sample {keys[where[0]]!r}"
    if np.isfinite(value):
        raise StoreError(
            f"{place} is {value:g}, which overflows {layout.dtype}: store a wider type (attribution.dtype)"
        )
    raise StoreError(f"{place} is {value}: check the model's weights and the images, or compute in a wider type")
