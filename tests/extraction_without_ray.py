"""An extraction by one worker in this process: what any other must give, whatever it runs on."""

from collections.abc import Sequence

import torch

from codec_dist.config import Config
from codec_dist.extraction.plan import Plan, make_plan, open_store
from codec_dist.extraction.worker import Receipt, ShardTask, ShardWorker
from codec_dist.shards import ShardInfo
from codec_dist.store import ContributionStore, finish_store


def extract_here(config: Config, order: Sequence[int] | None = None) -> str:
    """Write the run's store, shard by shard in the ``order`` of these numbers; returns its digest."""
    plan, shards = make_plan(config)
    open_store(plan, shards, {"device": "cpu"})
    return extract_planned(plan, shards, range(len(shards)) if order is None else order)


def extract_planned(plan: Plan, shards: Sequence[ShardInfo], order: Sequence[int]) -> str:
    """Complete the store of a plan, which exists; returns its digest."""
    worker = ShardWorker(plan, on_gpu=False, serial=0)
    threads = torch.get_num_threads()
    try:
        # The worker sets the threads of its process.
        assert worker.prepare() is None
        for turn, number in enumerate(order):
            assert isinstance(worker.extract(ShardTask(number, shards[number], 1, turn)), Receipt)
    finally:
        torch.set_num_threads(threads)
    finish_store(plan.store)
    return ContributionStore(plan.store).digest()
