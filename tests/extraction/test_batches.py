"""Microbatches: in order, never larger than asked, with everything unusable named; prepared ahead in a thread."""

import threading
from collections.abc import Generator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codec_dist.extraction.batches import Dropped, make_batches, prefetched
from codec_dist.shards import Decoded


class _Preparation:
    """White images are refused; the others keep their grey level."""

    def pixels(self, image: Image.Image) -> bytes:
        content = image.tobytes()
        if content[0] == 255:
            raise ValueError("white images are refused")
        return content

    def normalise(self, pixels: Sequence[bytes]) -> torch.Tensor:
        return torch.tensor([list(each) for each in pixels], dtype=torch.float32).view(-1, 1, 2, 2)


def _samples(kinds: list[str]) -> list[Decoded]:
    made = []
    for position, kind in enumerate(kinds):
        image = None if kind == "broken" else Image.new("L", (2, 2), 255 if kind == "white" else position)
        made.append(Decoded(f"key-{position}", position, position % 3 or None, image, "torn" if not image else None))
    return made


@settings(deadline=None)
@given(st.lists(st.sampled_from(["good", "good", "white", "broken"]), max_size=40), st.integers(1, 9))
def test_batches_hold_the_usable_samples_in_order_and_name_the_others(kinds: list[str], size: int) -> None:
    dropped: list[Dropped] = []
    batches = list(make_batches(_samples(kinds), _Preparation(), size, dropped.append))
    good = [position for position, kind in enumerate(kinds) if kind == "good"]
    assert [position for batch in batches for position in batch.positions] == good
    assert [key for batch in batches for key in batch.keys] == [f"key-{position}" for position in good]
    assert [int(label) for batch in batches for label in batch.labels] == [position % 3 or -1 for position in good]
    assert [float(image.mean()) for batch in batches for image in batch.images] == good
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert {each.position: each.reason.partition(":")[0] for each in dropped} == {
        position: "torn" if kind == "broken" else "cannot be prepared"
        for position, kind in enumerate(kinds)
        if kind != "good"
    }


def test_image_that_there_is_no_memory_for_is_not_dropped() -> None:
    class Greedy(_Preparation):
        def pixels(self, image: Image.Image) -> bytes:
            return bytes(torch.empty(1 << 60))  # the allocator refuses in its own words

    dropped: list[Dropped] = []
    with pytest.raises(RuntimeError, match="allocate"):
        list(make_batches(_samples(["good"]), Greedy(), 1, dropped.append))
    assert not dropped


def test_selection_of_a_batch_keeps_everything_together() -> None:
    (batch,) = make_batches(_samples(["good"] * 5), _Preparation(), 5, lambda _: None)
    part = batch.select([3, 1])
    assert part.keys == ("key-3", "key-1")
    assert part.positions == (3, 1)
    assert part.labels.tolist() == [-1, 1]
    assert part.images[:, 0, 0, 0].tolist() == [3, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory can only be pinned where there is a GPU")
def test_images_for_a_gpu_are_in_pinned_memory() -> None:
    (batch,) = make_batches(_samples(["good"] * 5), _prepare, 5, lambda _: None, pin=True)
    assert batch.images.is_pinned()


def test_prefetching_runs_ahead_by_no_more_than_asked() -> None:
    made: list[int] = []
    third = threading.Event()

    def source() -> Generator[int, None, None]:
        for number in range(100):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with prefetched(source(), depth=2) as items:
        assert third.wait(10)
        assert next(items) == 0
        # One taken, two waiting, one in the hand of the thread.
        assert len(made) <= 4
    assert len(made) <= 5


def test_source_is_closed_when_the_consumer_leaves_early() -> None:
    closed = threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    def leave() -> None:
        with prefetched(source(), depth=1) as items:
            next(items)
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        leave()
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_error_of_the_source_comes_after_the_items_before_it() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise ValueError("the third is torn")

    with prefetched(source(), depth=5) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(ValueError, match="the third is torn"):
            next(items)


def test_any_exit_of_the_source_reaches_the_consumer() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise SystemExit("a library gave up")

    with prefetched(source(), depth=5) as items:
        assert next(items) == 1
        with pytest.raises(SystemExit, match="gave up"):
            next(items)


def test_samples_without_the_label_that_is_needed_are_named() -> None:
    dropped: list[Dropped] = []
    batches = list(make_batches(_samples(["good"] * 5), _Preparation(), 5, dropped.append, labelled=True))
    assert [batch.positions for batch in batches] == [(1, 2, 4)]
    assert [(each.key, each.reason) for each in dropped] == [
        ("key-0", "there is no label, and the target needs one"),
        ("key-3", "there is no label, and the target needs one"),
    ]
