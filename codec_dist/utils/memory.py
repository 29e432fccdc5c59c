"""What becomes of memory that a process frees."""

import ctypes

# Numbers of glibc's mallopt, and the size from which freed memory still goes back to the system.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES, OLD_LIMIT = 1 << 30, 1 << 25


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
