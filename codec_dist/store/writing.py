"""Writing one shard's block: checked values, then samples, and the marker last."""

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from codec_dist.store.checksums import checksum, join_checksums
from codec_dist.store.chunks import ChunkFiles
from codec_dist.store.errors import StoreError, StoreFullError
from codec_dist.store.layout import read_layout
from codec_dist.store.ledger import Marker
from codec_dist.store.quantities import canonical_name
from codec_dist.store.sample_tables import prepare_samples, serialise_samples
from codec_dist.store.values import prepare_values
from codec_dist.utils import suggestion

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
                f"cannot write shard {shard} into {layout.place}: {reason}; free space or mend the disk"
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
