"""Why a worker was lost, in plain words, as far as Ray, the node and the worker itself tell."""

import faulthandler
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from codec_dist.utils import kernel_memory_kills

MEMORY = "killed for memory"
NODE = "node gone"
CRASH = "crashed"
ENDED = "killed or crashed"
UNREACHABLE = "unreachable"

SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}
# Where exceptions of Ray and Ray Train keep what caused them.
KEPT_CAUSES = ("cause", "health_check_failure", "controller_failure")

# Files stay open as long as the process that would crash.
_OPEN_FILES: list[object] = []


@dataclass(frozen=True)
class Loss:
    """A lost worker."""

    cause: str
    """One of few words, by which losses are counted."""
    text: str
    """What is known of this one."""


class KernelKills:
    """Processes of this machine that the kernel killed for memory, each of which explains one lost worker.

    Args:
        count: how many there were so far; None: the kernel does not tell.
    """

    def __init__(self, count: Callable[[], int | None] = kernel_memory_kills) -> None:
        self._count = count
        self._explained = self._seen = count() or 0

    def claim(self) -> bool:
        """Whether there was a kill that explains no other loss; from now on it explains this one."""
        if (self._count() or 0) <= self._explained:
            return False
        self._explained += 1
        return True

    def forget_old(self) -> None:
        """Let kills from before the last call of this explain nothing any more: they were of other processes."""
        self._explained = max(self._explained, self._seen)
        self._seen = self._count() or 0


def record_crashes(path: Path) -> None:
    """Let this process leave the signal that it crashes with in a file; nothing happens where that cannot be written.

    Ray tells of a crash only that the connection ended.
    """
    try:
        file = path.open("w")
    except OSError:
        return
    _OPEN_FILES.append(file)
    faulthandler.enable(file)


def current_node() -> str:
    """Ray's name of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def explain_loss(
    error: BaseException,
    *,
    node: str | None = None,
    crash_file: Path | None = None,
    killed_by_kernel: Callable[[], bool] | None = None,
) -> Loss:
    """What an error of Ray says about the worker that was lost.

    Args:
        error: what ``ray.get`` raised, or an error that it is the cause of.
        node: name of the worker's node, where that is known.
        crash_file: what the worker gave to :func:`record_crashes`.
        killed_by_kernel: whether the kernel of its machine has killed a process that no other loss was explained by
            (:meth:`KernelKills.claim`); asked only where nothing else explains the loss.
    """
    chain = list(_causes(error))
    of_memory = next((each for each in chain if isinstance(each, ray.exceptions.OutOfMemoryError)), None)
    if of_memory is not None or any("running low on memory" in str(each) for each in chain):
        return Loss(MEMORY, f"Ray killed it for memory{_memory_used(str(of_memory or error))}")
    if any(isinstance(each, ray.exceptions.NodeDiedError) for each in chain) or (node and not node_is_alive(node)):
        return Loss(NODE, "its node is gone")
    text = " ".join(str(each) for each in chain)
    if signal := _recorded_signal(crash_file):
        return Loss(CRASH, f"it crashed: {signal}")
    if code := re.search(r"exit code (\d+)", text):
        return Loss(CRASH, f"its process ended with exit code {code[1]}")
    if killed_by_kernel is not None and killed_by_kernel():
        return Loss(MEMORY, "the kernel killed it for memory")
    if any(isinstance(each, ray.exceptions.ActorUnavailableError) for each in chain):
        return Loss(UNREACHABLE, "it cannot be reached: its process or its node ended, or the network did")
    return Loss(ENDED, "its process was killed, or crashed without a trace (the node's kernel log may say more)")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, also where Ray keeps that in an attribute."""
    seen: set[int] = set()
    found: BaseException | None = error
    while isinstance(found, BaseException) and id(found) not in seen:
        seen.add(id(found))
        yield found
        kept = (getattr(found, name, None) for name in KEPT_CAUSES)
        found = next((each for each in kept if isinstance(each, BaseException)), found.__cause__)


def _memory_used(text: str) -> str:
    """``: 22.8 of 24.0 GB were used on 10.0.0.3``, from Ray's words."""
    found = re.search(r"\(IP: ([^,]+),.*?was ([\d.]+ ?GB)(?: used)? / ([\d.]+ ?GB)", text, re.DOTALL)
    return f": {found[2]} of {found[3]} were used on {found[1]}" if found else ""


def node_is_alive(node: str) -> bool:
    """Whether a node of the running cluster, by Ray's name, is there; Ray notices the end of one after seconds."""
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def _recorded_signal(path: Path | None) -> str | None:
    """The signal in a crash file, with the place in the Python code."""
    try:
        lines = [] if path is None else path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    name = next((line.partition(": ")[2] for line in lines if line.startswith("Fatal Python error: ")), None)
    if not name:
        return None
    place = next((line.strip() for line in lines if line.strip().startswith("File ")), "")
    return f"{name} ({SIGNALS.get(name, 'a signal')})" + (f" in {place.removeprefix('File ')}" if place else "")
