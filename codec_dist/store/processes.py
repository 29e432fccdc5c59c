"""Which process this is, and whether another one of this host still lives."""

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same number."""

    host: str
    system: str
    """The boot of the host and the space of its process numbers (containers have their own)."""
    pid: int
    started: str
    """When it started, as the system counts."""

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), _system(), os.getpid(), _started(os.getpid()) or "")


def is_dead(process: Process) -> bool | None:
    """Whether a process has ended; None for one whose host is not this one (or was started anew since)."""
    if (process.host, process.system) != (socket.gethostname(), _system()):
        return None
    return _started(process.pid) != process.started


def _system() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started; None if there is none, or only what its parent has not collected yet."""
    if not Path("/proc/self/stat").exists():
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    try:
        # The second field, the command in brackets, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]
