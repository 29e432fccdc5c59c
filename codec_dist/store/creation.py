"""Making a store, and refusing to mix the numbers of two configs in one."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import zarr

from codec_dist.store.errors import StoreError
from codec_dist.store.layout import ARRAYS, DTYPES, Layout, plain_json, read_layout

SHOWN_DIFFERENCES = 6
ABSENT = object()


def create_store(
    path: str | Path,
    *,
    identity: Mapping[str, Any],
    layers: Mapping[str, int],
    targets: Sequence[str],
    quantities: Sequence[str],
    shards: Sequence[tuple[str, int]],
    dtype: str = "float32",
    settings: Mapping[str, Any] = {},
) -> None:
    """Make a store, or check that an existing one is of the same identity.

    The arrays appear at once, by one rename: a process that is killed here leaves no half store.

    Args:
        path: folder of the store.
        identity: all that the numbers depend on, as nested JSON values.
        layers: layer key → channels.
        targets: names of the targets of contributions; plain quantity names mean the first.
        quantities: what is stored per layer, e.g. ``contribution-positive``.
        shards: name and number of samples of each shard; the place in this list is the shard number.
        dtype: float16, float32 or float64.
        settings: what was chosen by measuring; an existing store keeps its own.

    Raises:
        StoreError: a store of another identity (the differing fields are spelled out), something else at
            ``path``, or arguments that describe no store.
    """
    path = Path(path)
    layout = Layout(
        path, plain_json(identity), dict(layers), tuple(targets), tuple(quantities),
        tuple((name, int(samples)) for name, samples in shards), dtype, plain_json(settings),
    )  # fmt: skip
    _check_arguments(layout)
    if not layout.arrays.exists():
        _check_no_remains(layout)
        _create_arrays(layout)
    _check_same_identity(read_layout(path), layout)


def _check_arguments(layout: Layout) -> None:
    if not layout.layers or min(layout.layers.values()) < 1:
        raise StoreError(f"a store needs layers with at least one channel each: found {layout.layers}")
    if layout.dtype not in DTYPES:
        raise StoreError(f"a store cannot hold the type {layout.dtype!r}: choose one of {', '.join(DTYPES)}")
    names = [name for name, _ in layout.shards]
    if not names or len(set(names)) < len(names) or min(samples for _, samples in layout.shards) < 0:
        raise StoreError(f"a store needs shards of different names with their numbers of samples: found {len(names)}")
    assert layout.quantities  # raises where names are unknown


def _check_no_remains(layout: Layout) -> None:
    if layout.path.exists() and not layout.path.is_dir():
        raise StoreError(f"cannot make a store at {layout.path}: it is a file; choose another path")
    if any((layout.path / "ledger").glob("[0-9]*.json")):
        raise StoreError(
            f"{layout.path} has a ledger but no {ARRAYS}: its numbers are lost; remove the folder and extract anew"
        )


def _create_arrays(layout: Layout) -> None:
    layout.path.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{ARRAYS}.", suffix=".partial", dir=layout.path))
    try:
        group = zarr.create_group(work / ARRAYS, zarr_format=3, attributes=layout.attributes())
        rows = len(layout.shards) * layout.block_rows
        for layer, channels in layout.layers.items():
            for quantity in layout.quantities:
                group.create_array(
                    layout.array_path(layer, quantity),
                    shape=(rows, channels),
                    chunks=(layout.chunk_rows, channels),
                    dtype=layout.dtype,
                    compressors=None,
                    fill_value=0,
                    attributes={"layer": layer, "quantity": layout.quantities[quantity].full_name},
                    dimension_names=("row", "channel"),
                )
        try:
            (work / ARRAYS).rename(layout.arrays)
        except OSError:
            # Another process was faster; the caller compares identities.
            if not layout.arrays.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_same_identity(found: Layout, asked: Layout) -> None:
    if found.identity_hash == asked.identity_hash:
        return
    differences = [*spell_differences(found.identity, asked.identity), *spell_differences(found.form, asked.form)]
    shown = "; ".join(differences[:SHOWN_DIFFERENCES])
    more = len(differences) - SHOWN_DIFFERENCES
    rest = f"; and {more} more" if more > 0 else ""
    raise StoreError(
        f"the store {found.path} was made with other settings: {shown}{rest}. "
        "Choose another run directory, or give the settings of the store"
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
