"""The three parts of a data set: a pure function of seed and keys."""

import hashlib
import math

import numpy as np
import pyarrow as pa

from codec_dist.shards.errors import ShardError
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
    ranks = _ranks(samples, labels, seed)
    parts = np.empty(len(samples), dtype=np.int8)
    for label in np.unique(labels):
        members = labels == label
        count = int(members.sum())
        offset = derive_seed(seed, "split", int(label)) / 2**63
        # Rounding to 9 digits first keeps 0.1 + 0.2 of ten samples at three.
        cuts = [math.floor(round(share * count, 9) + offset) for share in (fit, fit + select)]
        parts[members] = np.searchsorted(cuts, ranks[members], side="right")
    names = pa.DictionaryArray.from_arrays(pa.array(parts), pa.array(PARTS)).cast(pa.string())
    return samples.select(["shard", "key", "label"]).append_column("part", names)


def _ranks(samples: pa.Table, labels: np.ndarray, seed: int) -> np.ndarray:
    """Rank of each sample within its class, by a hash of (seed, key); equal keys by their shard."""
    keys, shards = samples["key"].to_pylist(), samples["shard"].to_pylist()
    secret = derive_seed(seed, "split").to_bytes(8, "big")
    hashes = [hashlib.blake2b(key.encode(), digest_size=8, key=secret).digest() for key in keys]
    order = sorted(range(len(keys)), key=lambda row: (labels[row], hashes[row], shards[row]))
    ranks = np.empty(len(keys), dtype=np.int64)
    ordered = labels[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks[order] = np.arange(len(keys)) - starts
    return ranks
