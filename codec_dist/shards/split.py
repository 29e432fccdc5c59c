"""The three parts of a data set, a pure function of seed and keys; and a run's shards and parts as its config says."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from codec_dist.config import Config
from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardIndex, limit_samples, load_index
from codec_dist.shards.location import Retries
from codec_dist.utils import derive_seed

PARTS = ("fit", "select", "evaluate")


def make_split(samples: pa.Table, fit: float, select: float, evaluate: float, seed: int) -> pa.Table:
    """Assign every sample to ``fit``, ``select`` or ``evaluate``.

    Within each class (unlabelled samples are one class) samples are ranked by a hash of (seed, key), and
    the ranking is cut at the two fractions; each part has within one sample of its share of each class.
    Which way a share is rounded is drawn per class from the seed, so that many small classes do not all
    round the same way. The order of ``samples`` does not matter.

    Args:
        samples: table with columns shard, key, label (null if unlabelled).
        fit: fraction for fitting.
        select: fraction for choosing.
        evaluate: fraction for reporting.
        seed: seed of the hash.

    Returns:
        Table (shard, key, label, part: str) in the order of ``samples``.

    Raises:
        ShardError: a fraction is negative or they do not add up to 1.
    """
    if min(fit, select, evaluate) < 0 or abs(fit + select + evaluate - 1) > 1e-9:
        raise ShardError(f"the split {fit:g} + {select:g} + {evaluate:g} is not made of fractions that add up to 1")
    labels = samples["label"].fill_null(-1).to_numpy()
    classes, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ranks = _ranks(samples, labels, seed)
    cuts = np.empty((2, len(classes)), dtype=np.int64)
    for number, (label, count) in enumerate(zip(classes, counts)):
        offset = derive_seed(seed, "split", int(label)) / 2**63
        # Rounding to 9 digits first keeps 0.1 + 0.2 of ten samples at three.
        cuts[:, number] = [math.floor(round(share * int(count), 9) + offset) for share in (fit, fit + select)]
    parts = (ranks >= cuts[:, members]).sum(axis=0, dtype=np.int8)
    names = pa.DictionaryArray.from_arrays(pa.array(parts), pa.array(PARTS)).cast(pa.string())
    return samples.select(["shard", "key", "label"]).append_column("part", names)


def _ranks(samples: pa.Table, labels: np.ndarray, seed: int) -> np.ndarray:
    """Rank of each sample within its class, by a hash of (seed, key); equal keys by their shard."""
    secret = derive_seed(seed, "split").to_bytes(8, "big")
    hashes = bytearray()
    for batch in samples.select(["key"]).to_batches(max_chunksize=1 << 16):
        for key in batch["key"].to_pylist():
            hashes += hashlib.blake2b(key.encode(), digest_size=8, key=secret).digest()
    shards = samples["shard"].combine_chunks().dictionary_encode()
    names = np.array(shards.dictionary.to_pylist(), dtype=object)
    places = np.argsort(np.argsort(names))[shards.indices.to_numpy()] if len(names) else np.empty(0, np.int64)
    order = np.lexsort((places, np.frombuffer(bytes(hashes), ">u8"), labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    ordered = labels[order]
    ranks[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered, side="left")
    return ranks


# ---- A run's shards and parts as its config says: one place for all stages, so that none sees other samples


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
