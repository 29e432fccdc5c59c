"""What a store holds, for people."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codec_dist.store.layout import Layout
from codec_dist.store.ledger import Marker


@dataclass(frozen=True)
class StoreInfo:
    """A summary of a store."""

    path: str
    """Folder or URL."""
    identity: str
    """Identity hash."""
    layers: dict[str, int]
    """Layer key → channels."""
    quantities: tuple[str, ...]
    targets: tuple[str, ...]
    dtype: str
    shards: int
    shards_done: int
    samples: int
    """Rows of the finished shards."""
    dropped: int
    """Samples of the finished shards that have no row."""
    block_rows: int
    chunk_rows: int
    compression: str
    sharded: bool
    """Whether all chunks of a block are in one file."""
    bytes: int
    """Size of the finished blocks, padding included, before compression."""
    seconds: float
    """Sum of the times that the finished shards took."""

    @classmethod
    def of(cls, layout: Layout, markers: Mapping[int, Marker]) -> "StoreInfo":
        """Summary of a store with these finished shards."""
        row_bytes = sum(layout.layers.values()) * len(layout.quantities) * np.dtype(layout.dtype).itemsize
        return cls(
            path=str(layout.place),
            identity=layout.identity_hash,
            layers=dict(layout.layers),
            quantities=tuple(layout.quantities),
            targets=layout.targets,
            dtype=layout.dtype,
            shards=len(layout.shards),
            shards_done=len(markers),
            samples=sum(marker.rows for marker in markers.values()),
            dropped=sum(len(marker.dropped) for marker in markers.values()),
            block_rows=layout.block_rows,
            chunk_rows=layout.chunk_rows,
            compression=layout.compression,
            sharded=layout.sharding is not None,
            bytes=row_bytes * layout.block_rows * len(markers),
            seconds=sum(marker.seconds for marker in markers.values()),
        )

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return self.shards_done == self.shards

    @property
    def _form(self) -> str:
        packed = "" if self.compression == "none" else f", compressed ({self.compression})"
        return packed + (", one file per block" if self.sharded else "")

    def __str__(self) -> str:
        state = "complete" if self.complete else f"{self.shards - self.shards_done:,} pending"
        lines = [
            ("store", self.path),
            ("identity", self.identity[:16]),
            ("shards", f"{self.shards_done:,} of {self.shards:,} done ({state})"),
            ("samples", f"{self.samples:,} ({self.dropped:,} dropped)"),
            ("quantities", ", ".join(self.quantities)),
            ("targets", ", ".join(self.targets) or "none"),
            ("size", f"{self.bytes / 1e6:,.1f} MB of {self.dtype}"),
            ("blocks", f"{self.block_rows:,} rows in chunks of {self.chunk_rows:,}{self._form}"),
            ("time", f"{self.seconds:,.1f} s over all shards"),
        ]
        width = max(len(layer) for layer in self.layers)
        table = [f"{name:<12}{text}" for name, text in lines]
        table += [f"{'layers' if not number else '':<12}{layer:<{width}}  {channels:>6,} channels"
                  for number, (layer, channels) in enumerate(self.layers.items())]  # fmt: skip
        return "\n".join(table)
