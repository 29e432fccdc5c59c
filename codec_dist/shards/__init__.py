"""Images in WebDataset tars: packing, index, split into three parts, and checked streaming."""

from codec_dist.shards.decoding import Decoded
from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardIndex, build_index, limit_samples, load_index
from codec_dist.shards.packing import Sample, pack
from codec_dist.shards.reading import read_shard
from codec_dist.shards.retries import Retries
from codec_dist.shards.scanning import ShardInfo
from codec_dist.shards.sources import digits, image_folder
from codec_dist.shards.split import PARTS, make_split

__all__ = [
    "PARTS",
    "Decoded",
    "Retries",
    "Sample",
    "ShardError",
    "ShardIndex",
    "ShardInfo",
    "build_index",
    "digits",
    "image_folder",
    "limit_samples",
    "load_index",
    "make_split",
    "pack",
    "read_shard",
]
