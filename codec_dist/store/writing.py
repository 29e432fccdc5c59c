"""Writing one shard's block: checked values, then samples, and the marker last."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from codec_dist.store.checksums import checksum
from codec_dist.store.errors import StoreError
from codec_dist.store.layout import read_layout
from codec_dist.store.ledger import Marker
from codec_dist.store.quantities import canonical_name
from codec_dist.store.samples import prepare_samples, serialise_samples
from codec_dist.store.values import prepare_values
from codec_dist.utils import suggestion, write_bytes_atomically

# Zarr's settings are global: without a lock, one thread would take back what another has just set.
_ZARR_SETTINGS = threading.Lock()


class BlockWriter:
    """Writes the blocks of a store. Different shards share no file, so any number of writers and threads may run.

    Raises:
        StoreError: ``path`` is not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self._layout = read_layout(path)
        self._arrays: dict[tuple[str, str], Any] = {}

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
            The marker, which is on disk when this returns.

        Raises:
            StoreError: an array is missing, unknown or of another shape; a value is not finite, overflows
                the stored type or has the wrong sign (layer, channel and sample are named); samples and
                rows do not fit together; or the disk refuses.
        """
        layout = self._layout
        layout.check_shard(shard_number)
        table = prepare_samples(layout, shard_number, samples, dropped)
        keys = table["key"].to_pylist()
        blocks = {name: prepare_values(layout, name, array, keys) for name, array in self._name_arrays(values).items()}
        checksums: dict[str, dict[str, str]] = {layer: {} for layer in layout.layers}
        try:
            for (layer, quantity), block in blocks.items():
                self._write_block(shard_number, layer, quantity, block)
                checksums[layer][quantity] = checksum(block)
            write_bytes_atomically(layout.samples_path(shard_number), serialise_samples(table))
            marker = Marker(
                shard_number, layout.shards[shard_number][0], len(keys),
                tuple((str(key), str(reason)) for key, reason in dropped),
                checksums, layout.identity_hash, float(seconds), int(attempt),
            )  # fmt: skip
            marker.save(layout.marker_path(shard_number))
        except OSError as error:
            shard = layout.shards[shard_number][0]
            raise StoreError(
                f"cannot write shard {shard} into {layout.path}: {error.strerror or error}; free space or mend the disk"
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
                raise StoreError(
                    f"the store {layout.path} holds no quantity {quantity!r}: {suggestion(quantity, layout.quantities)}"
                )
            given[layer, name] = array
        expected = [(layer, quantity) for layer in layout.layers for quantity in layout.quantities]
        missing = [name for name in expected if name not in given]
        if missing:
            layer, quantity = missing[0]
            raise StoreError(
                f"{len(missing)} of {len(expected)} arrays are missing, first {quantity} of layer {layer!r}: give all"
            )
        return {name: given[name] for name in expected}

    def _write_block(self, shard_number: int, layer: str, quantity: str, block: np.ndarray) -> None:
        start, rows = self._layout.block_start(shard_number), self._layout.block_rows
        if len(block) < rows:
            block = np.concatenate([block, np.zeros((rows - len(block), block.shape[1]), block.dtype)])
        self._open(layer, quantity)[start : start + rows] = block

    def _open(self, layer: str, quantity: str) -> Any:
        if (layer, quantity) not in self._arrays:
            # Without this every chunk is first compared with zero, and a chunk of zeros leaves no file.
            # The array keeps the setting that it was opened under.
            with _ZARR_SETTINGS, zarr.config.set({"array.write_empty_chunks": True}):
                path = self._layout.arrays / self._layout.array_path(layer, quantity)
                self._arrays[layer, quantity] = zarr.open_array(path, mode="r+", zarr_format=3)
        return self._arrays[layer, quantity]
