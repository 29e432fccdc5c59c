"""SIGTERM and Ctrl-C: the first of them ends a command in an orderly way, later ones do not disturb that."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """The first signal that was received, if any was."""

    signal: int | None = None


@contextmanager
def orderly_interruption() -> Iterator[Interruption]:
    """Let the first SIGINT or SIGTERM (of Slurm, `timeout`, `ray job stop`, `kill`) raise KeyboardInterrupt here.

    So everything that is put in order at Ctrl-C is put in order at SIGTERM. Both are ignored from then on until
    the block is left, since an exception in the midst of putting things in order would leave them half done.
    SIGKILL ends the process at any time; what is on disk allows for it. Outside of the main thread, which alone
    gets signals, nothing changes.
    """
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        found.signal = number
        for each in STOPPING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        # Not an exception of its own: libraries in between raise a new KeyboardInterrupt.
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    # A signal that is ignored (SIGINT in the background of a shell) stays so.
    handled = [number for number in STOPPING_SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield found
    finally:
        for number in handled:
            signal.signal(number, before[number])
