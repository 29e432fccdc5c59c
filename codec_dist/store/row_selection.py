"""Which rows of a store: by class, key, shard, part of the split, or any predicate on the table of samples."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int

from codec_dist.store.errors import StoreError

PART = "part"


def find_rows(
    samples: pa.Table,
    conditions: dict[str, Any],
    predicate: pc.Expression | None,
    split: pa.Table | str | Path | None,
) -> Int[np.ndarray, "rows"]:
    """Places in ``samples`` of the rows that satisfy all conditions; see ``ContributionStore.find``."""
    if conditions.get(PART) is not None and split is None:
        raise StoreError(f"rows of part {conditions[PART]!r} were requested: give the split that says which they are")
    table = samples if split is None else samples.append_column(PART, _part_of_samples(samples, split))
    place = "__place__"
    numbered = table.append_column(place, pa.array(np.arange(len(table))))
    selected = pc.scalar(True) if predicate is None else predicate
    for column, wanted in conditions.items():
        if wanted is not None:
            values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
            selected &= pc.field(column).isin(pa.array(values, table.schema.field(column).type))
    try:
        found = numbered.filter(selected)
    except (pa.ArrowException, KeyError) as error:
        raise StoreError(
            f"cannot choose rows: {' '.join(str(error).split())}; the samples have {', '.join(table.column_names)}"
        ) from error
    return found[place].to_numpy()


def spread_rows(
    selected: Int[np.ndarray, "rows"], bounds: Sequence[int]
) -> list[tuple[int, Int[np.ndarray, "places"], Int[np.ndarray, "places"]]]:
    """Rows by the chunk that holds them.

    Args:
        selected: places in the table of samples, in any order, repeated or not.
        bounds: the first place of each chunk, ascending, and the end of the last.

    Returns:
        For each chunk with any of the rows: its number, the rows' places in ``chosen``, and their places in
        the chunk.
    """
    order = np.argsort(selected, kind="stable")
    cuts = np.searchsorted(selected[order], bounds)
    return [
        (number, order[first:last], selected[order[first:last]] - bounds[number])
        for number, (first, last) in enumerate(pairwise(cuts.tolist()))
        if last > first
    ]


def _part_of_samples(samples: pa.Table, split: pa.Table | str | Path) -> pa.ChunkedArray:
    """The part of each sample, joined by shard and key."""
    if not isinstance(split, pa.Table):
        try:
            split = pq.read_table(split, columns=["shard", "key", PART])
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot read the split {split}: {' '.join(str(error).split())}") from error
    names = samples.select(["shard", "key"]).append_column("place", pa.array(np.arange(len(samples))))
    split = split.select(["shard", "key", PART]).cast(
        pa.schema([("shard", pa.string()), ("key", pa.string()), (PART, pa.string())])
    )
    joined = names.join(split, keys=["shard", "key"], join_type="left outer").sort_by("place")
    unknown = joined.filter(pc.field(PART).is_null()).slice(0, 1).to_pylist()
    if unknown or len(joined) != len(samples):
        found = f"does not know {unknown[0]['key']} of {unknown[0]['shard']}" if unknown else "lists samples twice"
        raise StoreError(f"the split is not that of this store's samples: it {found}; make the split again")
    return joined[PART]
