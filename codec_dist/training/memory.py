"""How much memory a rank may fill with rows."""

from pathlib import Path

import torch

from codec_dist.training.ranks import Ranks

FRACTION_FOR_ROWS = 0.6


def bytes_for_rows(ranks: Ranks) -> int:
    """Bytes of rows that every rank can hold: a part of what is free now, the same number on each rank."""
    if ranks.device.type == "cuda":
        free = torch.cuda.mem_get_info(ranks.device)[0]
    else:
        free = min(_free_on_host(), _free_in_container()) // ranks.on_this_host
    return min(ranks.gather(int(free * FRACTION_FOR_ROWS)))


def _free_on_host() -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # Without /proc (macOS): assume that half of a small machine is free.
    return 4 << 30


def _free_in_container() -> int:
    limit, used = (_read(Path("/sys/fs/cgroup", name)).strip() for name in ("memory.max", "memory.current"))
    return int(limit) - int(used) if limit.isdigit() and used.isdigit() else _free_on_host()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
