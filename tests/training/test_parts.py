"""Plans, groups and what a training refuses: the parts of training, one by one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.config import Choice, SaeGroup, TrainingSettings
from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.training.loop import spread_over
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask, plan_jobs


def test_occasions_are_spread_evenly_and_end_with_the_last_epoch() -> None:
    assert spread_over(150, 10) == set(range(15, 151, 15))
    assert spread_over(3, 10) == {1, 2, 3}
    assert spread_over(7, 2) == {4, 7}


def test_plan_names_each_sae_once_and_by_all_that_its_weights_depend_on(make_run: Callable[..., Path]) -> None:
    store = ContributionStore(make_run() / "store")
    group = SaeGroup(layers=("blocks.*",), quantities=("contribution-*", "activation-positive", "contribution-net"))
    jobs = plan_jobs(store, (group, group), "split", 0)
    assert [job.key for job in jobs] == [
        (layer, quantity)
        for layer in ("blocks.0", "blocks.1")
        for quantity in (
            "contribution-positive",
            "contribution-negative",
            "activation-positive",
            "contribution-net",
        )
    ]
    (first, *_) = jobs
    assert str(first.folder) == f"blocks.0/contribution-positive/{first.digest[:12]}-s0"
    slower = group.model_copy(update={"training": TrainingSettings(learning_rate=1e-4)})
    others = [plan_jobs(store, (slower,), "split", 0)[0], plan_jobs(store, (group,), "other split", 0)[0]]
    digests = {job.digest for job in [*jobs, *others]}
    assert len(digests) == len(jobs) + 2


def test_unlabelled_rows_train_without_mode_statistics(
    make_run: Callable[..., Path],
    make_groups: Callable[..., tuple[SaeGroup, ...]],
    make_task: Callable[..., TrainingTask],
) -> None:
    task = make_task(make_run(labelled=False), make_groups(epochs=2)[:1])
    train_on_rank(task, Ranks())
    metrics = json.loads((task.folder(task.jobs[0]) / "metrics.json").read_text())
    assert "modes_class_correlated" not in metrics["select"]
    assert math.isfinite(metrics["select"]["ev"])


@pytest.mark.parametrize("rate", [1e38, 1e200])
def test_a_training_that_diverges_names_the_sae(
    make_run: Callable[..., Path], make_task: Callable[..., TrainingTask], rate: float
) -> None:
    wild = SaeGroup(
        architecture=Choice(name="stsae", options={"hidden": 8}),
        quantities=("contribution-positive",),
        training=TrainingSettings(epochs=1, learning_rate=rate),
    )
    with pytest.raises(TrainingError, match=r"blocks\.0/contribution-positive/stsae diverged by epoch 1 .*lower"):
        train_on_rank(make_task(make_run(), (wild,)), Ranks())
