"""Which rows of a store belong to which part of the split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor

from codec_dist.store import ContributionStore
from codec_dist.training.errors import TrainingError
from codec_dist.utils import hash_file

PART_NAMES = ("fit", "select", "evaluate")


@dataclass(frozen=True)
class Parts:
    """Rows by part, as ascending indices into the store's samples, and their labels."""

    indices: dict[str, Int[np.ndarray, "part_rows"]]
    labels: Int[Tensor, "rows"]
    """Label of every row of the store; −1 for none."""
    split_hash: str

    @property
    def classes(self) -> int:
        """Number of classes, judged by the largest label; 0 without labels."""
        return int(self.labels.max()) + 1 if len(self.labels) else 0


def read_parts(store: ContributionStore, split_path: Path) -> Parts:
    """Join the store's samples with ``split.parquet`` by shard and key.

    Raises:
        TrainingError: no such file, samples that the split does not know, or a part without rows.
    """
    try:
        split = pq.read_table(split_path, columns=["shard", "key", "part"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise TrainingError(f"cannot read the split {split_path} ({error}): run the stage that makes it") from error
    part = _part_of_rows(store.samples, split, split_path)
    indices = {name: np.flatnonzero(part == name) for name in PART_NAMES}
    check_parts({name: len(rows) for name, rows in indices.items()}, f"the store's {len(part)} samples")
    labels = store.samples["label"].fill_null(-1).to_numpy().astype(np.int64)
    return Parts(indices, torch.from_numpy(labels), hash_file(split_path))


def check_parts(samples: Mapping[str, int], of: str) -> None:
    """Refuse a split in which a part is empty, since training needs all three.

    Args:
        samples: number of samples of each part.
        of: what was split, for the message.

    Raises:
        TrainingError: with the part that is empty.
    """
    for name in PART_NAMES:
        if not samples.get(name):
            raise TrainingError(
                f"the part {name!r} of the split holds none of {of}: raise its fraction in data.split, or use more "
                "samples"
            )


def _part_of_rows(samples: pa.Table, split: pa.Table, split_path: Path) -> np.ndarray:
    split = split.cast(pa.schema([(name, pa.string()) for name in ("shard", "key", "part")]))
    names = samples.select(["shard", "key"]).cast(split.schema.remove(2))
    numbered = names.append_column("row", pa.array(np.arange(len(names))))
    joined = numbered.join(split, keys=["shard", "key"], join_type="left outer").sort_by("row")
    unknown = joined.filter(joined["part"].is_null())
    if len(unknown):
        shard, key = unknown["shard"][0], unknown["key"][0]
        raise TrainingError(
            f"{split_path} lists {len(joined) - len(unknown)} of the store's {len(names)} samples (not {shard}/{key}): "
            "it was made for other shards; make the split again"
        )
    if len(joined) != len(names):
        raise TrainingError(f"{split_path} lists samples more than once: make the split again")
    return joined["part"].to_numpy(zero_copy_only=False).astype(str)
