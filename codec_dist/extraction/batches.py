"""From a stream of decoded samples to microbatches, prepared ahead of their use."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from codec_dist.attribution import is_out_of_memory
from codec_dist.shards import Decoded

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Consecutive usable samples of one shard."""

    positions: tuple[int, ...]
    """Places in the shard."""
    keys: tuple[str, ...]
    labels: Int[Tensor, "batch"]
    """-1 where there is none."""
    images: Float[Tensor, "batch channel height width"]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, indices: Sequence[int]) -> "Batch":
        """The samples at ``indices``."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        return Batch(
            tuple(self.positions[index] for index in indices),
            tuple(self.keys[index] for index in indices),
            self.labels[rows],
            self.images[rows],
        )


@dataclass(frozen=True)
class Dropped:
    """A sample that has no row, and why."""

    position: int
    key: str
    reason: str


class Preparation(Protocol):
    """From decoded images to the model's inputs: what is odd about one image is found in ``pixels``."""

    def pixels(self, image: Image.Image) -> bytes:
        """One image, resized and cropped."""

    def normalise(self, pixels: Sequence[bytes]) -> Float[Tensor, "batch channel height width"]:
        """The inputs for many."""


def make_batches(
    samples: Iterable[Decoded],
    preparation: Preparation,
    size: int,
    drop: Callable[[Dropped], None],
    labelled: bool = False,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Prepared samples in batches of ``size`` (the last may be smaller); what cannot be used goes to ``drop``.

    ``labelled``: samples without a label cannot be used. ``pin``: images are in pinned memory.
    """
    waiting: list[tuple[Decoded, bytes]] = []
    for sample in samples:
        if sample.image is None:
            drop(Dropped(sample.position, sample.key, sample.error or "there is no image"))
            continue
        if labelled and sample.label is None:
            drop(Dropped(sample.position, sample.key, "there is no label, and the target needs one"))
            continue
        try:
            waiting.append((sample, preparation.pixels(sample.image)))
        except Exception as error:
            if is_out_of_memory(error):
                raise  # on another actor the image may be as good as any
            reason = " ".join(str(error).split())
            drop(Dropped(sample.position, sample.key, f"cannot be prepared: {type(error).__name__}: {reason}"))
        if len(waiting) == size:
            yield _stack(waiting, preparation, pin)
            waiting = []
    if waiting:
        yield _stack(waiting, preparation, pin)


def _stack(pairs: Sequence[tuple[Decoded, bytes]], preparation: Preparation, pin: bool) -> Batch:
    samples = [sample for sample, _ in pairs]
    images = preparation.normalise([pixels for _, pixels in pairs])
    return Batch(
        tuple(sample.position for sample in samples),
        tuple(sample.key for sample in samples),
        torch.tensor([-1 if sample.label is None else sample.label for sample in samples]),
        images.pin_memory() if pin else images,
    )


@contextmanager
def prefetched(source: Generator[Item, None, None], depth: int) -> Iterator[Iterator[Item]]:
    """Iterate ``source`` in a thread that runs at most ``depth`` items ahead, from now until the block ends.

    An exception of the source is raised where its item would have been.
    """
    items: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            try:
                items.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in source:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:  # noqa: BLE001  raised again by the consumer, who would else wait for ever
            put(None, error)
        finally:
            source.close()

    def consume() -> Iterator[Item]:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        thread.join()
