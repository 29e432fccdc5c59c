"""How much memory a rank may fill with rows, and what a rank says that has run out of memory."""

from collections.abc import Sequence

import torch

from codec_dist.training.collectives import Ranks
from codec_dist.utils import available_memory, tells_of_failed_allocation

FRACTION_FOR_ROWS = 0.6
# Where torch's account of a GPU's memory begins, which helps its own developers.
ACCOUNT_OF_TORCH = " Of the allocated memory"


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
