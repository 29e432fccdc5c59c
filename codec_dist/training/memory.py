"""How much memory a rank may fill with rows, and what becomes of memory that it frees."""

import ctypes
from pathlib import Path

import torch

from codec_dist.training.ranks import Ranks

FRACTION_FOR_ROWS = 0.6
# Numbers of glibc's mallopt, and the size from which freed memory still goes back to the system.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
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


def keep_freed_memory() -> None:
    """Let large tensors that are freed be used again by the next ones, where the C library is glibc.

    By default it gives each tensor above 32 MB back to the system, which hands it out again page by page,
    filled with zeros: at every step for every gradient. At 2,048 channels and 6,144 modes that was over a third
    of a step's CPU time (benchmarks/RESULTS.md).
    """
    try:
        options = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    options(MMAP_THRESHOLD, KEPT_BYTES)
    options(TRIM_THRESHOLD, 2 * KEPT_BYTES - 1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
