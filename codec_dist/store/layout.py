"""Where everything in a store is: the attributes that say what it holds, block and chunk sizes, paths."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codec_dist.config import store_of_run
from codec_dist.store.errors import StoreError
from codec_dist.store.place import LocalPlace, open_place
from codec_dist.store.quantities import Quantity, stored_quantities
from codec_dist.store.storage import Place
from codec_dist.utils import escape_name, hash_json, suggestion

FORMAT_NAME = "codec_dist contribution store"
FORMAT_VERSION = 2
DTYPES = ("float16", "float32", "float64")
LARGEST_CHUNK = 16 * 1024 * 1024
ARRAYS = "arrays.zarr"
SAMPLES = "samples.parquet"
GROUP = f"{ARRAYS}/zarr.json"


@dataclass(frozen=True)
class Layout:
    """What a store holds and where; equal for every process that opens it."""

    place: Place
    identity: dict[str, Any]
    """What the numbers depend on, as the maker of the store gave it."""
    layers: dict[str, int]
    """Layer key → channels."""
    targets: tuple[str, ...]
    requested: tuple[str, ...]
    """Quantities as asked, before contributions are expanded over targets."""
    shards: tuple[tuple[str, int], ...]
    """Name and number of samples of every shard, by shard number."""
    dtype: str
    settings: dict[str, Any]
    """Whatever was chosen by measuring when the store was made."""
    compression: str = "none"
    sharding: int | None = None
    """Rows of a chunk where all chunks of a block are in one file (a Zarr shard); None: a file for each chunk."""

    @cached_property
    def quantities(self) -> dict[str, Quantity]:
        """The arrays of each layer by quantity name."""
        return stored_quantities(self.requested, self.targets)

    @cached_property
    def block_rows(self) -> int:
        """Rows of each shard's block in every array: the largest shard, rounded up to whole chunks."""
        return self.chunk_rows * math.ceil(self._largest_shard / self.chunk_rows)

    @cached_property
    def chunk_rows(self) -> int:
        """Rows of a chunk: as ``sharding`` says, else the block, divided evenly into chunks of at most 16 MiB.

        Of the widest layer, that is; the chunks of all layers have equally many rows.
        """
        if self.sharding is not None:
            return min(self.sharding, self._largest_shard)
        row_bytes = max(self.layers.values()) * np.dtype(self.dtype).itemsize
        most_rows = max(1, LARGEST_CHUNK // row_bytes)
        return math.ceil(self._largest_shard / math.ceil(self._largest_shard / most_rows))

    @cached_property
    def identity_hash(self) -> str:
        """Hash of the identity and of the store's own form."""
        return hash_json([self.identity, self.form, self.shards])

    @cached_property
    def form(self) -> dict[str, Any]:
        """The store's own part of the identity, in a form that reads well where it differs."""
        return {
            "layers": self.layers,
            "targets": list(self.targets),
            "quantities": list(self.requested),
            "dtype": self.dtype,
            "shards": len(self.shards),
            "samples": sum(samples for _, samples in self.shards),
            "names and sizes of shards": hash_json(self.shards)[:12],
        }

    @property
    def path(self) -> Path:
        """The store's folder on disk.

        Raises:
            StoreError: the store is at a URL.
        """
        if not isinstance(self.place, LocalPlace):
            raise StoreError(f"the store {self.place} is at a URL: this needs one in a local folder, copy it there")
        return self.place.path

    def parts(self, rows: int) -> int:
        """Number of chunks with any of the first ``rows`` rows of a block."""
        return math.ceil(rows / self.chunk_rows)

    def array_folder(self, layer: str, quantity: str) -> str:
        """Folder of an array."""
        return f"{ARRAYS}/{self.array_path(layer, quantity)}"

    def file_parts(self) -> range:
        """The parts of a block that begin a file: all its chunks, or the first alone where chunks are sharded."""
        return range(1 if self.sharding else self.parts(self.block_rows))

    def chunk_file(self, layer: str, quantity: str, shard_number: int, part: int) -> str:
        """File with the chunk number ``part`` of a shard's block."""
        number = shard_number if self.sharding else shard_number * self.parts(self.block_rows) + part
        return f"{self.array_folder(layer, quantity)}/c.{number}.0"

    def array_path(self, layer: str, quantity: str) -> str:
        """Path of an array in the Zarr group."""
        return f"layers/{escape_name(layer)}/{self.quantities[quantity].path}"

    def block_start(self, shard_number: int) -> int:
        """First row of a shard's block."""
        return shard_number * self.block_rows

    def marker_file(self, shard_number: int) -> str:
        return f"ledger/{shard_number:06d}.json"

    def samples_file(self, shard_number: int) -> str:
        return f"samples/{shard_number:06d}.parquet"

    def channels(self, layer: str) -> int:
        """Channels of a layer.

        Raises:
            StoreError: the store does not hold the layer; the nearest names are given.
        """
        if layer not in self.layers:
            raise StoreError(f"the store {self.place} holds no layer {layer!r}: {suggestion(layer, self.layers)}")
        return self.layers[layer]

    def check_shard(self, shard_number: int) -> None:
        """Raise StoreError unless there is a shard of this number."""
        if not 0 <= shard_number < len(self.shards):
            raise StoreError(f"there is no shard {shard_number} in the store {self.place}: it has {len(self.shards)}")

    def attributes(self) -> dict[str, Any]:
        """The attributes of the Zarr group, from which :func:`read_layout` makes this layout again."""
        return {
            "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
            "identity": self.identity,
            "identity_hash": self.identity_hash,
            "layers": [[layer, channels] for layer, channels in self.layers.items()],
            "targets": list(self.targets),
            "quantities": list(self.requested),
            "dtype": self.dtype,
            "block_rows": self.block_rows,
            "chunk_rows": self.chunk_rows,
            "compression": self.compression,
            "sharding": self.sharding,
            "settings": self.settings,
            "shards": [[name, samples] for name, samples in self.shards],
        }

    @property
    def _largest_shard(self) -> int:
        return max(1, *(samples for _, samples in self.shards))


def read_layout(location: str | Path | Place) -> Layout:
    """The layout of an existing store.

    Raises:
        StoreError: there is no store, one of a format that this version does not read, or it cannot be reached.
    """
    place = open_place(location)
    attributes = _read_attributes(place)
    kind = attributes.get("format")
    if not isinstance(kind, dict) or kind.get("name") != FORMAT_NAME:
        raise StoreError(f"{place} is not a contribution store: {ARRAYS} holds something else; check the path")
    if kind.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"the store {place} has format version {kind.get('version')}, this version reads {FORMAT_VERSION}: "
            "use the version of codec_dist that wrote it, or extract again"
        )
    try:
        return _layout_of(place, attributes)
    except (KeyError, TypeError, ValueError, StoreError) as error:
        found = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise StoreError(
            f"the attributes of the store {place} are damaged ({found}): put back {GROUP} from a copy of the store, or "
            "remove the store and extract again"
        ) from error


def _layout_of(place: Place, attributes: dict[str, Any]) -> Layout:
    """The layout that attributes describe.

    Raises:
        KeyError: a field is missing.
        ValueError, StoreError: a field has values that no store has, or does not fit the others.
    """
    layers, shards = attributes["layers"], attributes["shards"]
    sharding, settings = attributes["sharding"], attributes["settings"]
    _require("layers", layers, _are_counts(layers, least=1) and layers)
    _require("shards", shards, _are_counts(shards, least=0) and shards)
    for name in ("targets", "quantities"):
        texts = attributes[name]
        _require(name, texts, isinstance(texts, list) and all(isinstance(text, str) for text in texts))
    _require("dtype", attributes["dtype"], attributes["dtype"] in DTYPES)
    _require("compression", attributes["compression"], isinstance(attributes["compression"], str))
    _require("sharding", sharding, sharding is None or (type(sharding) is int and sharding >= 1))
    _require("settings", settings, isinstance(settings, dict))
    _require("identity", attributes["identity"], isinstance(attributes["identity"], dict))
    layout = Layout(
        place=place,
        identity=attributes["identity"],
        layers=dict(layers),
        targets=tuple(attributes["targets"]),
        requested=tuple(attributes["quantities"]),
        shards=tuple((name, samples) for name, samples in shards),
        dtype=attributes["dtype"],
        settings=settings,
        compression=attributes["compression"],
        sharding=sharding,
    )
    _require("identity_hash", attributes["identity_hash"], attributes["identity_hash"] == layout.identity_hash)
    _require("block_rows", attributes["block_rows"], attributes["block_rows"] == layout.block_rows)
    assert layout.quantities  # raises where names are unknown
    return layout


def _are_counts(pairs: Any, least: int) -> bool:
    """Whether this is a list of different names with whole numbers."""
    return (
        isinstance(pairs, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        and all(isinstance(name, str) and type(count) is int and count >= least for name, count in pairs)
        and len({name for name, _ in pairs}) == len(pairs)
    )


def _require(field: str, value: Any, right: object) -> None:
    if not right:
        text = ascii(value)
        raise ValueError(f"{field} is {text if len(text) <= 60 else text[:60] + '…'}")


def store_exists(location: str | Path | Place) -> bool:
    """Whether a store was made at a location, also if it is damaged.

    Raises:
        StoreError: the location cannot be reached, or is none that a store can have.
    """
    place = open_place(location)
    try:
        return place.size(GROUP) is not None or bool(place.files(ARRAYS))
    except OSError as error:
        raise _unreachable(place, error) from error


def samples_version(location: str | Path | Place) -> str | None:
    """A text that changes whenever the table of all samples is written; None where there is none yet.

    Raises:
        StoreError: as :func:`store_exists`.
    """
    place = open_place(location)
    try:
        return place.version(SAMPLES)
    except OSError as error:
        raise _unreachable(place, error) from error


def find_store(location: str | Path) -> str:
    """Folder or URL of the store at a location, or of the store of the run there, wherever its config says that is.

    Raises:
        StoreError: there is neither.
        ConfigError: the run's config cannot be read.
    """
    place = open_place(location)
    for folder in ("", "store/"):
        if place.size(folder + GROUP) is not None:
            return f"{place}/{folder}".rstrip("/")
    if place.is_local and store_exists(elsewhere := store_of_run(place.text)):
        return elsewhere
    if place.is_folder():
        read_layout(place)  # says what is wrong with it
    raise StoreError(f"there is no store at {place}: give the folder that holds {ARRAYS}, or its run's folder")


def _read_attributes(place: Place) -> dict[str, Any]:
    try:
        metadata = json.loads(place.read(GROUP))
        attributes = metadata["attributes"]
        if (metadata["zarr_format"], metadata["node_type"]) == (3, "group") and isinstance(attributes, dict):
            return attributes
        cause: Exception | None = None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        cause = error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        cause = error
    except OSError as error:
        raise _unreachable(place, error) from error
    found = f"it has no readable {ARRAYS}" if place.is_folder() else "there is no such folder"
    raise StoreError(
        f"{place} is not a contribution store: {found}; check the path or run `codec-dist extract`"
    ) from cause


def _unreachable(place: Place, error: OSError) -> StoreError:
    return StoreError(f"cannot read the store {place}: {' '.join(str(error).split())}")


def plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` as JSON gives them back: tuples as lists, keys as text.

    Raises:
        TypeError: something in it is not JSON.
        ValueError: a NaN or an infinity.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    return plain
