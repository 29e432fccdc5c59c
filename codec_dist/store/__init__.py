"""The contribution store: Zarr arrays of fixed blocks per shard, a ledger of finished shards, and a reader."""

from codec_dist.store.creation import create_store
from codec_dist.store.digest import RowSum
from codec_dist.store.errors import LeaseError, StoreError, StoreFullError
from codec_dist.store.info import StoreInfo
from codec_dist.store.ledger import Ledger, Marker
from codec_dist.store.reading import Block, ContributionStore
from codec_dist.store.samples import finish_store
from codec_dist.store.writing import BlockWriter

__all__ = [
    "Block",
    "BlockWriter",
    "ContributionStore",
    "Ledger",
    "Marker",
    "RowSum",
    "LeaseError",
    "StoreError",
    "StoreFullError",
    "StoreInfo",
    "create_store",
    "finish_store",
]
