"""The lease: at most one coordinator works on a store, whatever happened to the one before."""

import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from codec_dist.store.checksums import checksum
from codec_dist.store.errors import LeaseError
from codec_dist.store.place import LocalPlace, open_place
from codec_dist.store.storage import Place

LEASE = "lease.json"
LEASE_FILES = r"lease\.json|lease\.\w+\.claim"
HEARTBEAT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0


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


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    id: str
    """Random, new for every lease."""
    process: Process

    @classmethod
    def parse(cls, content: bytes) -> "Owner":
        """The owner in a file's bytes; somebody unknown where they tell of none."""
        try:
            values: Any = json.loads(content)
            if re.fullmatch(r"\w+", values["id"]):  # it becomes part of a file's name
                return cls(values["id"], Process(**values["process"]))
        except (ValueError, TypeError, KeyError):
            pass
        return cls(checksum(content), Process("unknown", "", 0, ""))

    def content(self) -> bytes:
        """The bytes of the file."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


class Lease:
    """Holds a store for the length of a block; other processes, on any machine, are refused meanwhile.

    The holder renews the file ``lease.json`` every five seconds. A process that has died on this host is
    succeeded at once; one on another host when its file has not been renewed for thirty seconds, by the clock
    of the disk or server that keeps the file. Only exclusive creation and replacement of files are relied
    on, which network disks and object stores keep. Use as a context manager::

        with Lease(store) as lease:
            while ...:
                lease.check()

    Args:
        path: folder or URL of the store, which need not exist.
        heartbeat_seconds: time between renewals.
        patience_seconds: time without a renewal after which another host's lease has ended.
        age: seconds since a file of the place was written or renewed; for tests of the times above.
    """

    def __init__(
        self,
        path: str | Path | Place,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        age: Callable[[str], float | None] | None = None,
    ) -> None:
        self._place = open_place(path)
        self._heartbeat, self._patience = heartbeat_seconds, patience_seconds
        self._age = age or self._place.age
        self._owner = Owner(uuid.uuid4().hex, this_process())
        self._made_folder = False
        self._lost: str | None = None
        self._stop = threading.Event()
        self._renewed = 0.0
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Raise LeaseError if another process has taken the store over, or may have.

        That happens when this one could not renew its lease for thirty seconds: it was suspended, or the
        disk was away. A server that is busy keeps others waiting as well, so it is given the time that every
        request is given; whoever takes the store over first is found at the next renewal.
        """
        limit = max(self._patience, self._place.patience)
        if self._lost is None and time.monotonic() - self._renewed > limit:
            self._lost = f"it could not be renewed for {limit:g} s"
        if self._lost is not None:
            raise LeaseError(f"the lease of the store {self._place} is lost: {self._lost}; run the same command again")

    def __enter__(self) -> "Lease":
        """Take the lease.

        Raises:
            LeaseError: another process holds it (host, process and last sign of life are named), or the
                disk refuses.
        """
        try:
            self._made_folder = isinstance(self._place, LocalPlace) and not self._place.path.exists()
            self._acquire()
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise LeaseError(f"cannot take the lease of the store {self._place}: {reason}") from error
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="store-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._heartbeat)
        # What cannot be removed ends by itself when this process ends.
        with suppress(OSError):
            if self._read(LEASE) == self._owner:
                self._place.delete(LEASE)
            if self._made_folder and isinstance(self._place, LocalPlace):
                self._place.path.rmdir()

    def _acquire(self) -> None:
        while not self._place.create(LEASE, self._owner.content()):
            with suppress(FileNotFoundError):  # what was there a moment ago is not: look again
                if self._succeed(self._read(LEASE)):
                    return

    def _succeed(self, holder: Owner) -> bool:
        """Take the lease from a holder that is dead; False if another process was faster."""
        # The right to succeed is a file named after the dead one, which one process alone can create. It may die
        # as well before it has the lease: then it is succeeded in the same way.
        dead, name, claims = holder, LEASE, list[str]()
        while True:
            self._refuse_if_alive(dead, name)
            name = f"lease.{dead.id}.claim"
            claims.append(name)
            if self._place.create(name, self._owner.content()):
                break
            dead = self._read(name)
        try:
            # An heir that was faster removes its claim only when the lease is in its own name.
            if self._read(LEASE) != holder:
                self._place.delete(claims.pop())
                return False
        except FileNotFoundError:
            self._place.delete(claims.pop())
            raise
        self._place.write(LEASE, self._owner.content())
        for claim in claims:
            self._place.delete(claim)
        return True

    def _refuse_if_alive(self, owner: Owner, name: str) -> None:
        dead = is_dead(owner.process)
        age = self._age(name)
        if age is None:
            raise FileNotFoundError(name)
        if dead or (dead is None and age > self._patience):
            return
        hint = "" if dead is False else f"; if it is dead, its lease ends in {self._patience - age:.0f} s"
        raise LeaseError(
            f"the store {self._place} is in use by {owner.process} (last sign of life {max(0.0, age):.0f} s ago): "
            f"wait until it ends, or end it{hint}"
        )

    def _read(self, name: str) -> Owner:
        return Owner.parse(self._place.read(name))

    def _keep(self) -> None:
        while not self._stop.wait(self._heartbeat):
            try:
                holder = self._read(LEASE)
                if holder != self._owner:
                    self._lost = f"{holder.process} has taken it over"
                    return
                self._place.touch(LEASE, self._owner.content())
                self._renewed = time.monotonic()
            except FileNotFoundError:
                self._lost = f"its file {LEASE} was removed"
                return
            except OSError:
                continue  # `check` notices when this goes on for too long


# ---- Which process this is, and whether another one of this host still lives


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), _system(), os.getpid(), _started(os.getpid()) or "")


def is_dead(process: Process) -> bool | None:
    """Whether a process has ended; None for one whose host is not this one (or was started again since)."""
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
