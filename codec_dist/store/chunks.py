"""Chunks of a store's arrays: how they are laid out in files, and how they are read and written."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import MemoryStore

from codec_dist.store.checksums import RunningChecksum, split_checksums
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import ARRAYS, Layout
from codec_dist.store.ledger import Marker
from codec_dist.store.zarr_view import ZarrView

# Files `c.<chunk>.0` in the array's folder: by default (`c/<chunk>/0`) each has a folder of its own, which costs as
# much to make as the file.
KEYS = {"name": "default", "separator": "."}

# Measured on rectified noise (one core): lz4 1,530 MB/s to 88 % of the size, 820 with bytes instead of bits shuffled;
# zstd 205 MB/s to 58 %, at level 3 63 MB/s to 62 %.
COMPRESSORS: dict[str, Any] = {
    "none": None,
    "lz4": {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}},
    "zstd": {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"}},
}


class ChunkProblem(NamedTuple):
    """What is wrong with a chunk."""

    text: str
    checksum: str | None = None
    """Of the rows that are in its place, if there are any."""


class ChunkFiles:
    """The chunks of a store. Any number of threads may use one object.

    An array without compression and sharding has files of nothing but its numbers, which are read into and
    written from memory directly: Zarr's way to the same bytes takes three to five times as long
    (benchmarks/store.py).
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._dtype = np.dtype(layout.dtype).newbyteorder("<")
        # Array name → the Zarr array, or None where its files are plain.
        self._arrays: dict[tuple[str, str], Any] = {}

    def write_block(self, number: int, layer: str, quantity: str, block: np.ndarray) -> None:
        """Write a shard's valid rows [rows, channels], in the stored type, and the zeros that fill its block."""
        layout = self._layout
        plain = layout.compression == "none" and not layout.sharding
        rows_of_file = layout.block_rows // len(layout.file_parts())
        for part in layout.file_parts():
            name = layout.chunk_file(layer, quantity, number, part)
            rows = block[part * rows_of_file : (part + 1) * rows_of_file]
            if plain:
                layout.place.write_from(name, rows, rows_of_file * block.shape[1] * block.dtype.itemsize)
            else:
                filled = np.zeros((rows_of_file, block.shape[1]), block.dtype)
                filled[: len(rows)] = rows
                layout.place.write(name, encode_file(layout, filled))

    def read_block(self, marker: Marker, layer: str, quantity: str) -> np.ndarray:
        """The valid rows of a shard [rows, channels].

        Raises:
            StoreError: they are not what the marker says.
        """
        values = np.empty((marker.rows, self._layout.layers[layer]), self._dtype)
        size = self._layout.chunk_rows
        for part in range(self._layout.parts(marker.rows)):
            self._read(marker, layer, quantity, part, values[part * size : (part + 1) * size])
        return values

    def read_chunk(self, marker: Marker, layer: str, quantity: str, part: int) -> np.ndarray:
        """The valid rows of one chunk of a shard.

        Raises:
            StoreError: they are not what the marker says.
        """
        values = self._empty(marker, layer, part)
        self._read(marker, layer, quantity, part, values)
        return values

    def problem(self, marker: Marker, layer: str, quantity: str, part: int) -> ChunkProblem | None:
        """What is wrong with a chunk that the marker knows, None if nothing is."""
        return self._fill(marker, layer, quantity, part, self._empty(marker, layer, part))

    def _empty(self, marker: Marker, layer: str, part: int) -> np.ndarray:
        rows = min(self._layout.chunk_rows, marker.rows - part * self._layout.chunk_rows)
        return np.empty((rows, self._layout.layers[layer]), self._dtype)

    def _read(self, marker: Marker, layer: str, quantity: str, part: int, target: np.ndarray) -> None:
        problem = self._fill(marker, layer, quantity, part, target)
        if problem is not None:
            raise StoreError(
                f"{quantity} of layer {layer!r} is damaged in shard {marker.shard}: {problem.text}; "
                f"run `codec-dist store verify --repair {self._layout.place}`, then `codec-dist extract` again"
            )

    def _fill(self, marker: Marker, layer: str, quantity: str, part: int, target: np.ndarray) -> ChunkProblem | None:
        """Read a chunk's valid rows into ``target``; returns what is wrong with them."""
        stated = split_checksums(marker.checksums.get(layer, {}).get(quantity))
        if len(stated) != self._layout.parts(marker.rows):
            chunks = self._layout.parts(marker.rows)
            return ChunkProblem(f"the marker has {len(stated)} checksums for {chunks} chunks")
        file = self._layout.chunk_file(layer, quantity, marker.shard_number, part)
        try:
            array = self._open(layer, quantity)
            running = RunningChecksum()
            if array is None:
                read = self._layout.place.read_into(file, target, running.update)
                if read < target.nbytes:
                    return ChunkProblem(f"found {read:,} of {target.nbytes:,} bytes in {file}")
            else:
                start = self._layout.block_start(marker.shard_number) + part * self._layout.chunk_rows
                target[...] = array[start : start + len(target)]
                running.update(target.reshape(-1).view(np.uint8))
        except FileNotFoundError:
            return ChunkProblem(f"found no file {file}")
        except Exception as error:  # decoders raise anything when a file is torn
            if isinstance(error, OSError) and not self._layout.place.is_local:
                raise StoreError(f"cannot read {file} of the store: {' '.join(str(error).split())}") from error
            return ChunkProblem(f"found {type(error).__name__} in {file}: {' '.join(str(error).split())}")
        found = running.result()
        if found == stated[part]:
            return None
        return ChunkProblem(f"found crc32c:{found} in {file}, the marker says {stated[part]}", found)

    def _open(self, layer: str, quantity: str) -> Any:
        if (layer, quantity) not in self._arrays:
            layout = self._layout
            metadata = json.loads(layout.place.read(f"{layout.array_folder(layer, quantity)}/zarr.json"))
            shape = [len(layout.shards) * layout.block_rows, layout.layers[layer]]
            if metadata["shape"] != shape or metadata["data_type"] != layout.dtype:
                raise ValueError(f"an array of {metadata['data_type']} {metadata['shape']} instead of {shape}")
            array = None
            if not is_plain(metadata, [layout.chunk_rows, shape[1]]):
                view = ZarrView(layout.place, ARRAYS)
                array = zarr.open_array(view, path=layout.array_path(layer, quantity), mode="r", zarr_format=3)
            self._arrays[layer, quantity] = array
        return self._arrays[layer, quantity]


# ---- How arrays are laid out in files: the metadata of the Zarr group, and chunks that are compressed or sharded


def group_files(layout: Layout) -> dict[str, bytes]:
    """Name (below the group's folder) and content of every metadata file of the group, in no order."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=layout.attributes())
    rows = len(layout.shards) * layout.block_rows
    for layer, channels in layout.layers.items():
        for quantity, facts in layout.quantities.items():
            group.create_array(
                layout.array_path(layer, quantity),
                shape=(rows, channels),
                attributes={"layer": layer, "quantity": facts.full_name},
                dimension_names=("row", "channel"),
                **_array_options(layout, channels),
            )
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def is_plain(metadata: dict[str, Any], chunk_shape: list[int]) -> bool:
    """Whether an array has these chunks, each a file with nothing but its numbers, in C order and little-endian."""
    return (
        metadata["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
        and metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
        and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
        and not metadata.get("storage_transformers")
    )


def encode_file(layout: Layout, values: np.ndarray) -> bytes:
    """The file of one chunk, or of one block where chunks are sharded, from all its rows.

    Encoded in memory by Zarr, so that what is in place is never read (as it would be for a sharded array) nor
    half replaced.
    """
    files: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(files),
        shape=values.shape,
        zarr_format=3,
        # Without this every chunk is first compared with zero, and a chunk of zeros leaves no file.
        config={"write_empty_chunks": True},
        **_array_options(layout, values.shape[1]),
    )
    array[...] = values
    return bytes(files["c.0.0"].to_bytes())


def metadata_problems(expected: bytes, found: bytes | None) -> str | None:
    """What is wrong with a metadata file, None if it says what it should."""
    if found is None:
        return "is missing"
    try:
        values, wanted = json.loads(found), json.loads(expected)
        wrong = next(_metadata_differences(wanted, values), None)
    except (ValueError, AttributeError):
        return "is not JSON"
    return None if wrong is None else f"has another {wrong} than this store's arrays"


def _metadata_differences(wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield from (field for field, value in wanted.items() if found.get(field) != value)


def _array_options(layout: Layout, channels: int) -> dict[str, Any]:
    return {
        "chunks": (layout.chunk_rows, channels),
        "shards": (layout.block_rows, channels) if layout.sharding else None,
        "dtype": layout.dtype,
        "compressors": COMPRESSORS[layout.compression],
        "fill_value": 0,
        "chunk_key_encoding": KEYS,
    }
