"""What the actor does with batches that cannot be attributed whole: order kept, bad samples named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from codec_dist.attribution import NotFiniteError
from codec_dist.config import Config
from codec_dist.extraction.batches import Batch, Dropped
from codec_dist.extraction.plan import Plan, build_attributor
from codec_dist.extraction.worker import Failure, ShardTask, ShardWorker, Stopwatch
from codec_dist.models import load_model
from codec_dist.shards import ShardInfo, load_index

MakeConfig = Callable[..., Config]


class Faulty:
    """An attributor for images of their own number: some are not finite."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> list[int]:
        numbers = [int(image.mean()) for image in images]
        assert labels.tolist() == numbers
        if faulty := [place for place, number in enumerate(numbers) if number in self.bad]:
            raise NotFiniteError(f"sample {faulty[0]} of the batch: its pixels are not finite", faulty)
        return numbers


def _worker(make_config: MakeConfig, attributor: Faulty, location: str = "nowhere") -> ShardWorker:
    config = make_config()
    plan = Plan(config, location, "nowhere", "", {}, (), (), ("top_1",), {}, microbatch=8, needs={})
    worker = ShardWorker(plan, on_gpu=False, serial=0)
    worker._attributor = attributor
    return worker


def _batch(size: int) -> Batch:
    numbers = torch.arange(size)
    images = numbers[:, None, None, None].expand(size, 1, 2, 2).float()
    return Batch(tuple(range(size)), tuple(f"key-{number}" for number in range(size)), numbers, images)


def _run(worker: ShardWorker, size: int) -> tuple[list[int], list[Dropped]]:
    dropped: list[Dropped] = []
    rows = []
    for part, result in worker._attribute(_batch(size), dropped):
        assert list(part.positions) == result
        rows += result
    return rows, dropped


def test_samples_that_are_not_finite_are_dropped_and_the_others_keep_their_order(make_config: MakeConfig) -> None:
    rows, dropped = _run(_worker(make_config, Faulty({2, 5})), 8)
    assert rows == [0, 1, 3, 4, 6, 7]
    assert [(each.position, each.key) for each in dropped] == [(2, "key-2"), (5, "key-5")]
    assert dropped[0].reason == "its pixels are not finite"
    assert "not finite" in dropped[1].reason
    assert not any("of the batch" in each.reason for each in dropped)


def test_batch_of_bad_samples_alone_leaves_no_row(make_config: MakeConfig) -> None:
    rows, dropped = _run(_worker(make_config, Faulty(set(range(4)))), 4)
    assert rows == []
    assert len(dropped) == 4


class Greedy(nn.Module):
    """Has no memory for any image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.hungry = model, False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.hungry:
            torch.empty(1 << 60)  # the allocator of the CPU refuses in its own words
        return self.model(images)


def test_actor_that_has_run_out_of_memory_is_not_used_any_more(make_config: MakeConfig, packed: Path) -> None:
    worker = _worker(make_config, Faulty(set()), str(packed))
    loaded = load_model(worker._plan.config.model, seed=0)
    greedy = Greedy(loaded.module)
    worker._model = dataclasses.replace(loaded, module=greedy)
    worker._attributor = build_attributor(make_config(attribution={"layers": ["model.blocks.5"]}), worker._model)
    worker._attributor.probe(torch.zeros(1, 1, 16, 16))
    greedy.hungry = True
    outcome = worker.extract(ShardTask(0, load_index(packed).shards[0], 1, 0))
    assert isinstance(outcome, Failure)
    assert "the memory of the cpu is too small for 8 images at once" in outcome.reason
    assert outcome.broken


def test_shard_that_cannot_even_begin_does_not_hold_up_the_next(make_config: MakeConfig) -> None:
    worker = _worker(make_config, Faulty(set()))
    worker._attributor = SimpleNamespace(targets=())
    for turn in (1, 0, 2):
        # The model was never loaded, so the prefetch cannot start.
        outcome = worker.extract(ShardTask(turn, ShardInfo("a.tar", 1, 1, ""), 1, turn))
        assert isinstance(outcome, Failure)
        assert outcome.broken
    with worker._turn(3, Stopwatch()):
        pass
