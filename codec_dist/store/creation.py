"""Making a store, and refusing to mix the numbers of two configs in one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codec_dist.store.encoding import COMPRESSORS, group_files
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import ARRAYS, DTYPES, GROUP, Layout, plain_json, read_layout
from codec_dist.store.ledger import marker_numbers
from codec_dist.store.place import Place, open_place
from codec_dist.utils import naming_full_disk

SHOWN_DIFFERENCES = 6
ABSENT = object()


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
            f"{layout.place} has a ledger but no {ARRAYS}: its numbers are lost; remove the folder and extract anew"
        )


def _check_same_identity(found: Layout, asked: Layout) -> None:
    if found.identity_hash == asked.identity_hash:
        return
    differences = [*spell_differences(found.identity, asked.identity), *spell_differences(found.form, asked.form)]
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = len(differences) - SHOWN_DIFFERENCES
    rest = f"; and {more} more" if more > 0 else ""
    raise StoreError(
        f"the store {found.place} was made with other settings: {shown}{rest}. "
        "Choose another place (store.location, or run.directory), or give the settings of the store"
    )


def spell_differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One phrase for each field that differs, such as ``method.options.steps: 10 in the store, 20 asked``."""
    return [
        f"{'.'.join(field)}: {_show(old, 'nothing')} in the store, {_show(new, 'nothing')} asked"
        for field, old, new in _differences(found, asked, ())
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
