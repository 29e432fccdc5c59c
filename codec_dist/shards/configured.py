"""A run's shards and their parts, as its config says: one place for all stages, so that none sees other samples."""

from pathlib import Path

import pyarrow as pa

from codec_dist.config import Config
from codec_dist.shards.index import ShardIndex, limit_samples, load_index
from codec_dist.shards.retries import Retries
from codec_dist.shards.split import make_split
from codec_dist.utils import derive_seed


def configured_index(config: Config, retries: Retries | None = None) -> ShardIndex:
    """The index of the run's shards, after ``data.limit``; made on demand and kept under the run.

    Args:
        config: the whole config.
        retries: patience with a remote source.

    Raises:
        ShardError: shards are missing or not as indexed.
    """
    cache = Path(config.run.directory) / "index"
    data = config.data
    index = load_index(
        data.shards, cache, label_field=data.label_field, retries=retries, image_fields=data.image_fields
    )
    return index if config.data.limit is None else limit_samples(index, config.data.limit)


def configured_split(config: Config, samples: pa.Table) -> pa.Table:
    """The part of each of the run's samples, see :func:`make_split`."""
    split = config.data.split
    return make_split(samples, split.fit, split.select, split.evaluate, split_seed(config))


def split_seed(config: Config) -> int:
    """The seed from which the run's split is drawn."""
    return derive_seed(config.run.seed, "split")
