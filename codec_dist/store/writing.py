"""Writing a store: making it, checking the numbers of a block, and writing one shard's block, the marker last."""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from codec_dist.store.checksums import RunningChecksum, checksum, join_checksums
from codec_dist.store.chunks import COMPRESSORS, ChunkFiles, group_files
from codec_dist.store.errors import StoreError, StoreFullError
from codec_dist.store.layout import ARRAYS, DTYPES, GROUP, Layout, plain_json, read_layout
from codec_dist.store.ledger import Marker, marker_numbers
from codec_dist.store.place import open_place
from codec_dist.store.quantities import canonical_name
from codec_dist.store.sample_tables import prepare_samples, serialise_samples
from codec_dist.store.storage import Place
from codec_dist.utils import naming_full_disk, suggestion

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

SHOWN_DIFFERENCES = 6
ABSENT = object()

PIECE_VALUES = 64 * 1024


class BlockWriter:
    """Writes the blocks of a store. Different shards share no file, so any number of writers and threads may run.

    Raises:
        StoreError: ``path`` is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self._layout = read_layout(path)
        self._chunks = ChunkFiles(self._layout)

    def write(
        self,
        shard_number: int,
        values: Mapping[tuple[str, str], np.ndarray],
        samples: pa.Table,
        dropped: Sequence[tuple[str, str]] = (),
        seconds: float = 0,
        attempt: int = 1,
    ) -> Marker:
        """Write all that is stored for one shard. Writing it again replaces it, with the same bytes if they are.

        Args:
            shard_number: the shard's place in the list that the store was made with.
            values: (layer key, quantity) → array [rows, channels], for every array of the store.
            samples: one row per row of the arrays: key, label (null if unlabelled), prediction, target_value,
                baseline_value, and any columns more, such as ``completeness.<layer key>``.
            dropped: key and reason of every sample of the shard that has no row.
            seconds: how long the shard took.
            attempt: how often it was tried.

        Returns:
            The marker, which is in place when this returns.

        Raises:
            StoreError: an array is missing, unknown or of another shape; a value is not finite, overflows
                the stored type or has the wrong sign (layer, channel and sample are named); samples and
                rows do not fit together; or the disk refuses (StoreFullError if it is full).
        """
        layout = self._layout
        layout.check_shard(shard_number)
        table = prepare_samples(layout, shard_number, samples, dropped)
        keys = table["key"].to_pylist()
        blocks = {name: prepare_values(layout, name, array, keys) for name, array in self._name_arrays(values).items()}
        table_bytes = serialise_samples(table)
        shard = layout.shards[shard_number][0]
        checksums: dict[str, dict[str, str]] = {layer: {} for layer in layout.layers}
        for (layer, quantity), block in blocks.items():
            checksums[layer][quantity] = join_checksums(block.checksums)
        try:
            layout.place.map(lambda name: self._chunks.write_block(shard_number, *name, blocks[name].values), blocks)
            layout.place.write(layout.samples_file(shard_number), table_bytes)
            marker = Marker(
                shard_number, shard, len(keys), tuple((str(key), str(reason)) for key, reason in dropped),
                checksums, join_checksums([checksum(table_bytes)]), layout.identity_hash, float(seconds), int(attempt),
            )  # fmt: skip
            marker.save(layout.place, layout.marker_file(shard_number))
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            kind = StoreFullError if error.errno in NO_SPACE else StoreError
            raise kind(
                f"cannot write shard {shard} into {layout.place}: {reason}; free space or repair the disk"
            ) from error
        return marker

    def _name_arrays(self, values: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        """``values`` by canonical name and in the store's order, refused unless it is all that is stored."""
        layout = self._layout
        given: dict[tuple[str, str], np.ndarray] = {}
        for (layer, quantity), array in values.items():
            layout.channels(layer)
            name = canonical_name(quantity, layout.quantities)
            if name not in layout.quantities:
                nearest = suggestion(quantity, layout.quantities)
                raise StoreError(f"the store {layout.place} holds no quantity {quantity!r}: {nearest}")
            given[layer, name] = array
        expected = [(layer, quantity) for layer in layout.layers for quantity in layout.quantities]
        missing = [name for name in expected if name not in given]
        if missing:
            layer, quantity = missing[0]
            raise StoreError(
                f"{len(missing)} of {len(expected)} arrays are missing, first {quantity} of layer {layer!r}: give all"
            )
        return {name: given[name] for name in expected}


# ---- Making a store, and refusing to mix the numbers of two configs in one


def create_store(
    path: str | Path | Place,
    *,
    identity: Mapping[str, Any],
    layers: Mapping[str, int],
    targets: Sequence[str],
    quantities: Sequence[str],
    shards: Sequence[tuple[str, int]],
    dtype: str = "float32",
    settings: Mapping[str, Any] = {},
    compression: str = "none",
    sharding: int | None = None,
) -> None:
    """Make a store, or check that an existing one is of the same identity.

    On disk the arrays appear at once, by one rename: a process that is killed here leaves no half store. In an
    object store the group's metadata come first and decide for all who make it; the next call adds what is
    missing.

    Args:
        path: folder of the store, or its URL.
        identity: all that the numbers depend on, as nested JSON values.
        layers: layer key → channels.
        targets: names of the targets of contributions; plain quantity names mean the first.
        quantities: what is stored per layer, e.g. ``contribution-positive``.
        shards: name and number of samples of each shard; the place in this list is the shard number.
        dtype: float16, float32 or float64.
        settings: what was chosen by measuring; an existing store keeps its own.
        compression: ``none``, ``lz4`` or ``zstd``; an existing store keeps its own.
        sharding: rows of a chunk, if all chunks of a shard's block in an array are to be one file; by default
            a block is as few chunks as possible and each is a file. An existing store keeps its own.

    Raises:
        StoreError: a store of another identity (the differing fields are spelled out), something else at
            ``path``, or arguments that describe no store.
    """
    layout = Layout(
        open_place(path), plain_json(identity), dict(layers), tuple(targets), tuple(quantities),
        tuple((name, int(samples)) for name, samples in shards), dtype, plain_json(settings), compression, sharding,
    )  # fmt: skip
    _check_arguments(layout)
    try:
        if layout.place.size(GROUP) is None:
            _check_no_remains(layout)
            with naming_full_disk(layout.place.text):
                layout.place.publish(ARRAYS, group_files(layout), first="zarr.json")
        found = read_layout(layout.place)
        _check_same_identity(found, layout)
        add_missing_metadata(found)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise StoreError(f"cannot make a store at {layout.place}: {reason}") from error


def add_missing_metadata(layout: Layout) -> None:
    """Write the metadata of arrays that a store has lost, or never got because its maker was killed."""
    files = {f"{ARRAYS}/{name}": content for name, content in group_files(layout).items()}
    missing = [name for name, size in zip(files, layout.place.map(layout.place.size, files)) if size is None]
    layout.place.map(lambda name: layout.place.write(name, files[name]), missing)


def _check_arguments(layout: Layout) -> None:
    if not layout.layers or min(layout.layers.values()) < 1:
        raise StoreError(f"a store needs layers with at least one channel each: found {layout.layers}")
    if layout.dtype not in DTYPES:
        raise StoreError(f"a store cannot hold the type {layout.dtype!r}: choose one of {', '.join(DTYPES)}")
    if layout.compression not in COMPRESSORS:
        raise StoreError(f"unknown compression {layout.compression!r}: choose one of {', '.join(COMPRESSORS)}")
    if layout.sharding is not None and layout.sharding < 1:
        raise StoreError(f"a chunk in a sharded file has at least 1 row: found sharding={layout.sharding}")
    names = [name for name, _ in layout.shards]
    if not names or len(set(names)) < len(names) or min(samples for _, samples in layout.shards) < 0:
        raise StoreError(f"a store needs shards of different names with their numbers of samples: found {len(names)}")
    assert layout.quantities  # raises where names are unknown


def _check_no_remains(layout: Layout) -> None:
    if marker_numbers(layout):
        raise StoreError(
            f"{layout.place} has a ledger but no {ARRAYS}: its numbers are lost; remove the folder and extract again"
        )


def _check_same_identity(found: Layout, requested: Layout) -> None:
    if found.identity_hash == requested.identity_hash:
        return
    differences = [
        *spell_differences(found.identity, requested.identity),
        *spell_differences(found.form, requested.form),
    ]
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = len(differences) - SHOWN_DIFFERENCES
    rest = f"; and {more} more" if more > 0 else ""
    raise StoreError(
        f"the store {found.place} was made with other settings: {shown}{rest}. "
        "Choose another place (store.location, or run.directory), or give the settings of the store"
    )


def spell_differences(found: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """One phrase for each field that differs, such as ``method.options.steps: 10 in the store, 20 requested``."""
    return [
        f"{'.'.join(field)}: {_show(old, 'nothing')} in the store, {_show(new, 'nothing')} requested"
        for field, old, new in _differences(found, requested, ())
    ]


def _differences(old: Any, new: Any, field: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), (*field, str(key)))
    elif type(old) is not type(new) or old != new:
        yield field, old, new


def _show(value: Any, absent: str) -> str:
    text = absent if value is ABSENT else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


# ---- Checks on the numbers that go into a block, and their checksums, in one pass over them


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
