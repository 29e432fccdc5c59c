"""How much memory a rank may fill with rows."""

from pathlib import Path

import torch

from codec_dist.training.ranks import Ranks

FRACTION_FOR_ROWS = 0.6
CONTROL_GROUP = Path("/sys/fs/cgroup")


def bytes_for_rows(ranks: Ranks) -> int:
    """Bytes of rows that every rank can hold: a part of what is free now, the same number on each rank."""
    if ranks.device.type == "cuda":
        # What torch holds back for later tensors is free for rows.
        unused = torch.cuda.memory_reserved(ranks.device) - torch.cuda.memory_allocated(ranks.device)
        free = torch.cuda.mem_get_info(ranks.device)[0] + unused
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
    """What the control group (version 2) of this process leaves; files in the page cache can be dropped."""
    limit, used = (_read(CONTROL_GROUP / name).strip() for name in ("memory.max", "memory.current"))
    if not (limit.isdigit() and used.isdigit()):
        return _free_on_host()
    statistics = dict(line.split() for line in _read(CONTROL_GROUP / "memory.stat").splitlines())
    return int(limit) - int(used) + int(statistics.get("inactive_file", 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
