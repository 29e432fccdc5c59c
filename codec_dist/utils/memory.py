"""What becomes of memory that a process frees."""

import ctypes

# Numbers of glibc's mallopt, and the size from which freed memory still goes back to the system.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let large tensors that are freed be used again by the next ones, where the C library is glibc.

    By default it gives each tensor above 32 MB back to the system, which hands it out again page by page,
    filled with zeros: at every step of a training for every gradient, say. With 2,048 channels and 6,144 modes
    that was over a third of a step's CPU time (benchmarks/RESULTS.md). For processes that belong to this package:
    it holds for all that they do.
    """
    try:
        options = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    options(MMAP_THRESHOLD, KEPT_BYTES)
    options(TRIM_THRESHOLD, 2 * KEPT_BYTES - 1)
