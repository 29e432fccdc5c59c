"""Whether the rows of a layer are held in memory or streamed: decided once in a run, for their order depends on it."""

import json
from pathlib import Path

from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.utils import read_json, write_json_atomically

FILE = "rows.json"
# Rows are loaded at first into six tenths of what is free; later into nine tenths if need be.
SQUEEZE = 1.5


def decide_residency(folder: Path, needed: int, free: int, ranks: Ranks, *, rows_hash: str, whole: bool) -> bool:
    """Whether all rows are to be in memory; the same on every rank.

    What was found when the first SAE on these rows began is kept in ``folder``, and holds from then on: a training
    that goes on when memory is scarcer or more plentiful would else get its batches in another order.

    Args:
        folder: that of the layer and quantity.
        needed: bytes of the rows that a rank has to hold.
        free: bytes that every rank has for rows.
        ranks: those that train together; all call this.
        rows_hash: of the rows; what was kept for others says nothing.
        whole: whether every rank holds all rows, as divided dictionaries need them.

    Raises:
        TrainingError: rows that were in memory when the first SAE was trained on them, and do not fit now.
    """
    kind = "whole" if whole else "shared"
    kept: dict[str, bool] = ranks.from_first(_read(folder, rows_hash) if ranks.rank == 0 else {})
    if kind not in kept:
        kept = kept | {kind: needed <= free}
        if ranks.rank == 0:
            write_json_atomically(folder / FILE, {"rows": rows_hash, "in_memory": kept})
    if kept[kind] and needed > SQUEEZE * free:
        raise TrainingError(
            f"the rows of {folder} were in memory when training began, {needed:,} bytes, and now there is room for "
            f"{int(SQUEEZE * free):,} on each rank: free memory, or remove {FILE} and resume-* there to stream them "
            "from the start"
        )
    return kept[kind]


def _read(folder: Path, rows_hash: str) -> dict[str, bool]:
    try:
        found = read_json(folder / FILE)
        of_these = found["in_memory"] if found["rows"] == rows_hash else {}
        return {str(kind): bool(value) for kind, value in of_these.items()}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return {}
