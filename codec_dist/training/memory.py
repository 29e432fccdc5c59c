"""How much memory a rank may fill with rows."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from codec_dist.training.ranks import Ranks

FRACTION_FOR_ROWS = 0.6
CONTROL_GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class GroupFiles(NamedTuple):
    """What the files of a control group are called, in one version of them."""

    limit: str
    used: str
    droppable: str
    """A line of memory.stat."""


VERSION_1 = GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = GroupFiles("memory.max", "memory.current", "inactive_file")


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
    # Without /proc (macOS) the system does not tell: half of all memory.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_container() -> int:
    """What the control groups of this process, and those around them, leave; cached files can be dropped."""
    left = [_left_in(folder, names) for folder, names in _control_groups()]
    return min([free for free in left if free is not None], default=_free_on_host())


def _control_groups() -> Iterator[tuple[Path, GroupFiles]]:
    """The folder of every control group of memory that holds this process, and what its files are called."""
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (CONTROL_GROUPS / "memory", VERSION_1) if controllers else (CONTROL_GROUPS, VERSION_2)
        folder = base / path.lstrip("/")
        # In a container the path may be that of the host, of which only the last part is seen as the base.
        for group in (folder, *folder.parents):
            if group == base or base in group.parents:
                yield group, names


def _left_in(folder: Path, names: GroupFiles) -> int | None:
    limit, used = (_read(folder / name).strip() for name in (names.limit, names.used))
    if not (limit.isdigit() and used.isdigit()):
        return None
    statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(limit) - int(used) + int(statistics.get(names.droppable, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
