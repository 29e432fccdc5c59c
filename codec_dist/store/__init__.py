"""The contribution store: Zarr arrays of fixed blocks per shard, a ledger of finished shards, and a reader."""

from codec_dist.store.creation import create_store
from codec_dist.store.digest import RowSum
from codec_dist.store.errors import LeaseError, StoreError, StoreFullError
from codec_dist.store.faults import Fault, Verification
from codec_dist.store.info import StoreInfo
from codec_dist.store.layout import find_store
from codec_dist.store.lease import Lease
from codec_dist.store.ledger import Ledger, Marker
from codec_dist.store.reading import Block, ContributionStore
from codec_dist.store.samples import finish_store
from codec_dist.store.verification import repair_store, verify_store
from codec_dist.store.writing import BlockWriter

__all__ = [
    "Block",
    "BlockWriter",
    "ContributionStore",
    "Fault",
    "Ledger",
    "Marker",
    "RowSum",
    "Lease",
    "LeaseError",
    "StoreError",
    "StoreFullError",
    "StoreInfo",
    "Verification",
    "create_store",
    "find_store",
    "finish_store",
    "repair_store",
    "verify_store",
]
