"""Learning rates over time, as pure functions."""

import math

import numpy as np
import pytest
import torch

from codec_dist.training.schedules import Plateau, rate_factor


def test_cosine_falls_from_the_rate_to_zero() -> None:
    factors = [rate_factor("cosine", progress) for progress in (0, 0.5, 1)]
    assert factors == pytest.approx([1, 0.5, 0])
    assert rate_factor("constant", 0.7) == rate_factor("plateau", 0.7) == 1


@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
def test_warm_up_rises_linearly_and_leaves_the_rest_as_it_is(schedule: str) -> None:
    rising = [
        rate_factor(schedule, progress, 0.2) / rate_factor(schedule, progress) for progress in (0, 0.05, 0.1, 0.2)
    ]
    assert rising == pytest.approx([0, 0.25, 0.5, 1])
    for progress in (0.2, 0.5, 1.0):
        assert rate_factor(schedule, progress, 0.2) == rate_factor(schedule, progress)


def test_warm_up_may_last_for_the_whole_training() -> None:
    assert [rate_factor("constant", progress, 1.0) for progress in (0, 0.3, 1)] == pytest.approx([0, 0.3, 1])


def test_plateau_halves_as_pytorch_does() -> None:
    losses = [*np.exp(-np.arange(5.0)), *([0.02] * 14), 0.01, *([0.0099999] * 9)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    plateau = Plateau(patience=3)
    for loss in losses:
        oracle.step(loss)
        plateau.update(loss)
        assert plateau.factor == optimizer.param_groups[0]["lr"]
    assert plateau.factor < 0.2


def test_the_papers_plateau_halves_after_the_eleventh_epoch_without_improvement() -> None:
    plateau = Plateau(patience=10)
    plateau.update(1.0)
    factors = []
    for _ in range(22):
        plateau.update(1.0)
        factors.append(plateau.factor)
    assert factors == [1.0] * 10 + [0.5] * 11 + [0.25]


def test_a_loss_that_is_not_a_number_is_no_improvement() -> None:
    plateau = Plateau(patience=1)
    for _ in range(2):
        plateau.update(math.nan)
    assert plateau.factor == 0.5
    assert plateau.best == math.inf
