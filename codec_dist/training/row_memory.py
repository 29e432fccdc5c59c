"""How much memory a rank may fill with rows, and whether those of a layer are held in memory or streamed."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.utils import available_memory, read_json, tells_of_failed_allocation, write_json_atomically

FILE = "rows.json"
# Rows are loaded at first into six tenths of what is free; later into nine tenths if need be.
SQUEEZE = 1.5

FRACTION_FOR_ROWS = 0.6
# Where torch's account of a GPU's memory begins, which helps its own developers.
ACCOUNT_OF_TORCH = " Of the allocated memory"


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


# ---- How much memory a rank may fill with rows, and what a rank says that has run out of memory


def bytes_for_rows(ranks: Ranks) -> int:
    """Bytes of rows that every rank can hold: a part of what is free now, the same number on each rank."""
    if ranks.device.type == "cuda":
        # What torch holds back for later tensors is free for rows.
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        free = torch.cuda.mem_get_info(ranks.device)[0] + unused
    else:
        free = available_memory() // ranks.on_this_host
    return min(ranks.gather(int(free * FRACTION_FOR_ROWS)))


def failed_allocation(causes: Sequence[BaseException]) -> str | None:
    """The line, in what ranks have raised, that says that memory could not be had; None where none does.

    Args:
        causes: errors of ranks as Ray Train hands them on: their text is that of the rank's, with its stack.
    """
    for cause in causes:
        lines = [line.strip() for line in f"{type(cause).__name__}: {cause}".splitlines()]
        # The last is that of the error itself: those before show code, in which such words may occur.
        found = next(filter(tells_of_failed_allocation, reversed(lines)), None)
        if found is not None:
            return found.partition(ACCOUNT_OF_TORCH)[0]
    return None
