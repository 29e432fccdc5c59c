"""Images in WebDataset tars: packing, index, split into three parts, and checked streaming."""

from codec_dist.shards.class_lists import ClassList, read_class_list
from codec_dist.shards.errors import ShardError
from codec_dist.shards.folders import image_folder
from codec_dist.shards.index import ShardIndex, build_index, limit_samples, load_index
from codec_dist.shards.location import Retries, shards_folder
from codec_dist.shards.packing import pack
from codec_dist.shards.parquet import is_parquet, parquet_images
from codec_dist.shards.samples import AddressableSource, CountedSource, Sample, digits
from codec_dist.shards.scanning import Findings, ShardInfo
from codec_dist.shards.shapes import Part, PartTable, Shapes, read_parts, shape_parts, shapes
from codec_dist.shards.shard_reading import Decoded, read_shard
from codec_dist.shards.split import PARTS, configured_index, configured_split, make_split, split_seed
from codec_dist.shards.tally import Tally

__all__ = [
    "PARTS",
    "AddressableSource",
    "ClassList",
    "CountedSource",
    "Decoded",
    "Findings",
    "Part",
    "PartTable",
    "Retries",
    "Sample",
    "Shapes",
    "ShardError",
    "ShardIndex",
    "ShardInfo",
    "Tally",
    "build_index",
    "configured_index",
    "configured_split",
    "digits",
    "image_folder",
    "is_parquet",
    "limit_samples",
    "load_index",
    "make_split",
    "pack",
    "parquet_images",
    "read_class_list",
    "read_parts",
    "read_shard",
    "shape_parts",
    "shapes",
    "shards_folder",
    "split_seed",
]
