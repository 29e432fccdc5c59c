"""The contribution store: Zarr arrays of fixed blocks per shard, a ledger of finished shards, and a reader."""

from typing import TYPE_CHECKING

from codec_dist.store.checksums import RowSum
from codec_dist.store.errors import LeaseError, StoreError, StoreFullError
from codec_dist.store.hdf5 import export_hdf5, import_hdf5
from codec_dist.store.info import StoreInfo
from codec_dist.store.layout import find_store, samples_version, store_exists
from codec_dist.store.lease import Lease
from codec_dist.store.ledger import Ledger, Marker
from codec_dist.store.quantities import stored_quantities
from codec_dist.store.reading import Block, Chunk, ChunkName, ContributionStore
from codec_dist.store.sample_tables import finish_store
from codec_dist.store.verification import Problem, Verification, repair_store, verify_store
from codec_dist.store.writing import BlockWriter, create_store

if TYPE_CHECKING:
    from codec_dist.store.torch_rows import RowBatch, RowDataset

__all__ = [
    "Block",
    "BlockWriter",
    "Chunk",
    "ChunkName",
    "ContributionStore",
    "Problem",
    "Ledger",
    "Marker",
    "RowBatch",
    "RowDataset",
    "RowSum",
    "Lease",
    "LeaseError",
    "StoreError",
    "StoreFullError",
    "StoreInfo",
    "Verification",
    "create_store",
    "export_hdf5",
    "find_store",
    "finish_store",
    "import_hdf5",
    "repair_store",
    "samples_version",
    "store_exists",
    "stored_quantities",
    "verify_store",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Torch is imported by those who ask for its data set, not by all who read a store.
        if name in ("RowBatch", "RowDataset"):
            from codec_dist.store import torch_rows

            return getattr(torch_rows, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
