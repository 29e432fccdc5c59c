"""Functions that tests fold over; in a module of their own, so that workers can import them."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codec_dist.utils import CodecError


@dataclass
class Trace:
    """Remembers the order of merges, and a sum whose bits depend on it."""

    order: list[int] = field(default_factory=list)
    total: np.ndarray = field(default_factory=lambda: np.zeros(3, np.float32))
    environment: tuple[str | None, ...] = ()

    def merge(self, other: "Trace") -> None:
        self.order += other.order
        self.total += other.total


def trace(item: int) -> Trace:
    values = np.random.default_rng(item).normal(size=3).astype(np.float32) * np.float32(10.0**item)
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return Trace([item], values, tuple(os.environ.get(name) for name in names))


@dataclass(frozen=True)
class DieOnce:
    """Kills its process at the first try of one item; ``marker`` tells tries apart."""

    marker: Path
    item: int

    def __call__(self, item: int) -> Trace:
        if item == self.item and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return trace(item)


@dataclass(frozen=True)
class RefuseCompany:
    """An error where another call is at work in the same folder."""

    folder: Path

    def __call__(self, item: int) -> Trace:
        mark = self.folder / "at work"
        mark.touch(exist_ok=False)
        result = trace(item)
        mark.unlink()
        return result


def refuse(item: int) -> Trace:
    if item == 2:
        raise CodecError(f"item {item} is bad: repair it")
    return trace(item)


def raise_own_error(item: int) -> Trace:
    if item == 0:
        raise FileNotFoundError(2, "No such file or directory", "/data/gone.tar")
    raise RuntimeError(f"item {item} has no values")


def die(item: int) -> Trace:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(item)
