"""How much memory a rank may fill with rows."""

import torch

from codec_dist.training.ranks import Ranks
from codec_dist.utils import available_memory

FRACTION_FOR_ROWS = 0.6


def bytes_for_rows(ranks: Ranks) -> int:
    """Bytes of rows that every rank can hold: a part of what is free now, the same number on each rank."""
    if ranks.device.type == "cuda":
        # What torch holds back for later tensors is free for rows.
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        free = torch.cuda.mem_get_info(ranks.device)[0] + unused
    else:
        free = available_memory() // ranks.on_this_host
    return min(ranks.gather(int(free * FRACTION_FOR_ROWS)))
