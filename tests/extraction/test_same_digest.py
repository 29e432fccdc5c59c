"""The digest depends on neither the number of actors, nor the order of shards, nor how far batches are prefetched."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from codec_dist.cluster_runtime import Session
from codec_dist.config import Config
from codec_dist.extraction import extract
from codec_dist.extraction import worker as worker_module
from codec_dist.extraction.plan import make_plan, open_store
from codec_dist.extraction.worker import Receipt, ShardTask, ShardWorker
from codec_dist.store import ContributionStore, finish_store

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A worker sets the threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _digest_without_ray(config: Config, order: Sequence[int]) -> str:
    plan, shards = make_plan(config)
    open_store(plan, shards, {"device": "cpu"})
    worker = ShardWorker(plan, on_gpu=False, serial=0)
    assert worker.prepare() is None
    for turn, number in enumerate(order):
        assert isinstance(worker.extract(ShardTask(number, shards[number], 1, turn)), Receipt)
    finish_store(plan.store)
    return ContributionStore(plan.store).digest()


def test_prefetch_and_order_do_not_change_the_digest(
    make_config_in: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for depth, order in ((1, range(6)), (2, [3, 0, 5, 1, 4, 2]), (9, [5, 4, 3, 2, 1, 0])):
        monkeypatch.setattr(worker_module, "PREFETCH", depth)
        digests.add(_digest_without_ray(make_config_in(tmp_path / f"depth-{depth}"), order))
    assert len(digests) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_four_actors_give_the_digest_of_one(ray_cluster: Session, make_config_in: MakeConfig, tmp_path: Path) -> None:
    config = make_config_in(tmp_path / "four", cluster={"actors": 4})
    assert extract(config).samples == 120
    assert ContributionStore(config.store_location).digest() == _digest_without_ray(
        make_config_in(tmp_path / "one"), range(6)
    )
