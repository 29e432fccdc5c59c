"""How much memory a process may still use, and what becomes of memory that it frees."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Numbers of glibc's mallopt, and the size from which freed memory still goes back to the system.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES, OLD_LIMIT = 1 << 30, 1 << 25

# Of torch on GPUs and CPUs and the libraries below it, of NumPy, of Python, and of the C library.
ALLOCATION_FAILURES = (
    "OutOfMemoryError",
    "MemoryError",
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
)

CONTROL_GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class GroupFiles(NamedTuple):
    """What the files of a control group are called, in one version of them."""

    limit: str
    used: str
    droppable: str
    """A line of memory.stat."""


VERSION_1 = GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = GroupFiles("memory.max", "memory.current", "inactive_file")


def available_memory(groups: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process and those beside it can still allocate: what the machine and its containers leave.

    Args:
        groups: where the control groups are mounted.
        membership: which of them hold this process.
    """
    on_host = _free_on_host()
    left = [_left_in(folder, names) for folder, names in _control_groups(groups, membership)]
    return min([on_host, *(max(0, free) for free in left if free is not None)])


def kernel_memory_kills(groups: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """How many processes the kernel has killed for memory in the containers of this process; None: it does not tell."""
    counts = []
    for folder, _ in _control_groups(groups, membership):
        counts += [*_counted(folder / "memory.events"), *_counted(folder / "memory.oom_control")]
    return max(counts or _counted(Path("/proc/vmstat")), default=None)


def tells_of_failed_allocation(text: str) -> bool:
    """Whether a message says that memory could not be had: many libraries, and errors of other processes, have no
    class of error for that.
    """
    return any(words in text for words in ALLOCATION_FAILURES)


def keep_freed_memory() -> None:
    """Let large tensors that are freed be used again by the next ones, where the C library is glibc.

    By default it gives each tensor above 32 MB back to the system, which hands it out again page by page,
    filled with zeros: at every step of a training for every gradient, say. With 2,048 channels and 6,144 modes
    that was over a third of a step's CPU time (benchmarks/RESULTS.md). For processes that belong to this package:
    it holds for all that they do. In threads it takes MALLOC_ARENA_MAX=1 from the start of the process, too: other
    arenas give back what is above 64 MB whatever they are told.
    """
    try:
        options = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # Older versions of glibc refuse more than 32 MB. Only where one of both was taken: either call fixes the other
    # threshold too, which otherwise grows by itself.
    if options(MMAP_THRESHOLD, KEPT_BYTES) or options(MMAP_THRESHOLD, OLD_LIMIT):
        options(TRIM_THRESHOLD, 2 * KEPT_BYTES - 1)


def _free_on_host() -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # Without /proc (macOS) the system does not tell: half of all memory.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _control_groups(groups: Path, membership: Path) -> Iterator[tuple[Path, GroupFiles]]:
    """The folder of every control group of memory that holds this process, and what its files are called."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (groups / "memory", VERSION_1) if controllers else (groups, VERSION_2)
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


def _counted(path: Path) -> list[int]:
    """The number in the line ``oom_kill NUMBER`` of a file, if it has one."""
    return [int(line.split()[1]) for line in _read(path).splitlines() if line.startswith("oom_kill ")]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
