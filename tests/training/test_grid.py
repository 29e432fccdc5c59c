"""What a grid asks for, what each SAE is called, and what is refused before anything starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codec_dist.config import Choice, ConfigError, SaeGroup, TrainingSettings, parse_config
from codec_dist.sae import SaeError
from codec_dist.store import ContributionStore
from codec_dist.training import TrainingError, check_training, expand_grid
from codec_dist.training.sae_jobs import SaeJob, plan_jobs


def plan(run: Path, *groups: SaeGroup, seed: int = 7) -> list[SaeJob]:
    return plan_jobs(ContributionStore(run / "store"), groups, "split", seed)


def test_a_grid_is_every_combination_of_its_values_and_seeds() -> None:
    group = SaeGroup(
        architecture=Choice(name="topk", options={"modes": 8, "k": 1}),
        grid={"k": (2, 3), "training.learning_rate": (0.1, 0.2)},
        seeds=(0, 4),
        training=TrainingSettings(epochs=5),
    )
    points = [(point.options, point.settings.learning_rate, point.seed) for point in expand_grid(group)]
    assert points == [({"modes": 8, "k": k}, rate, seed) for k in (2, 3) for rate in (0.1, 0.2) for seed in (0, 4)]
    assert all(point.settings.epochs == 5 for point in expand_grid(group))
    (alone,) = expand_grid(SaeGroup())
    assert (alone.options, alone.seed, alone.grid_values) == ({}, 0, {})


def test_an_sae_is_the_same_whether_a_grid_or_a_group_asks_for_it(make_run: Callable[..., Path]) -> None:
    run, one = make_run(), {"layers": ("blocks.1",), "quantities": ("contribution-positive",)}
    grid = SaeGroup(grid={"k": (2, 3), "training.epochs": (4, 150)}, seeds=(0, 1), **one)
    single = SaeGroup(architecture=Choice(name="topk", options={"k": 3}), **one)
    jobs = plan(run, grid)
    assert len({job.folder for job in jobs}) == len({job.label for job in jobs}) == 8
    (alone,) = plan(run, single)
    assert [job.folder for job in jobs].index(alone.folder) == 6
    assert len(plan(run, grid, single)) == 8
    assert [job.seed for job in jobs] == [7, 8] * 4
    assert jobs[6].label == "blocks.1/contribution-positive/topk/k=3,training.epochs=150,seed=7"
    assert alone.label == "blocks.1/contribution-positive/topk"


def test_settings_that_came_later_leave_names_as_they_were(make_run: Callable[..., Path]) -> None:
    run = make_run()

    def digest(**training: Any) -> str:
        return plan(run, SaeGroup(training=TrainingSettings(**training)))[0].digest

    assert digest() == digest(gradient_clip=None, precision="float32", divide=True, warmup=0)
    assert digest() != digest(gradient_clip=1)
    assert digest() != digest(precision="bfloat16")


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ({"kk": (1,)}, TrainingError, r"topk has no option 'kk'; did you mean k"),
        ({"training.learningrate": (1,)}, TrainingError, r"did you mean training\.learning_rate"),
        ({"training.epochs": (0,)}, TrainingError, r"sae.groups.grid: training.epochs: .*\(found 0\)"),
        ({"channels": (3,)}, TrainingError, "topk has no option 'channels'"),
        ({"k": (99,)}, SaeError, r"blocks.0 \(8 channels\): .*between 1 and the number of modes"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_training({"blocks.0": 8}, ["contribution-positive", "activation-positive"], [SaeGroup(grid=grid)])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"grid": {"k": []}}, r"`sae\.groups\.0\.grid\.k`.*at least 1 item"),
        ({"seeds": []}, r"`sae\.groups\.0\.seeds`.*at least 1 item"),
        ({"seeds": [-1]}, r"`sae\.groups\.0\.seeds\.0`"),
    ],
)
def test_a_grid_of_no_members_is_named(group: dict[str, Any], message: str) -> None:
    sections = {"run": {"directory": "run"}, "data": {"shards": "shards"}, "model": {"spec": "timm:x"}}
    with pytest.raises(ConfigError, match=message):
        parse_config({**sections, "sae": {"groups": [group]}})


def test_a_group_of_no_layers_is_named(make_run: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match=r"sae\.groups\.layers is empty"):
        plan(make_run(), SaeGroup(layers=()))
