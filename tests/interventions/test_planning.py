"""Conditions: the right numbers of channels, the right classes, the right masks."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.interventions import (
    Condition,
    InterventionError,
    channel_counts,
    choose_off_targets,
    choose_targets,
    plan_experiment,
    random_order,
    rank_channels,
)


def test_percentages_become_whole_channels_and_at_least_one() -> None:
    counts = channel_counts((1, 2, 5, 10, 18, 25, 50, 80, 99), 32)
    assert counts == {1: 1, 2: 1, 5: 1, 10: 3, 18: 5, 25: 8, 50: 16, 80: 25, 99: 31}


def test_decimal_percentages_are_exact() -> None:
    assert channel_counts((2.3, 0.1, 100), 1000) == {0.1: 1, 2.3: 23, 100: 1000}


@pytest.mark.parametrize(("percentages", "channels"), [((), 8), ((0,), 8), ((101,), 8), ((-1,), 8), ((5,), 0)])
def test_senseless_percentages_are_refused(percentages: tuple[float, ...], channels: int) -> None:
    with pytest.raises(InterventionError):
        channel_counts(percentages, channels)


@given(st.sets(st.integers(0, 50), min_size=2), st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_off_targets_are_other_classes_and_depend_on_the_seed_alone(classes: set[int], count: int, seed: int) -> None:
    chosen = choose_off_targets(sorted(classes), count, seed)
    assert set(chosen) == classes
    for target, others in chosen.items():
        assert target not in others
        assert set(others) <= classes
        assert len(others) == len(set(others)) == min(count, len(classes) - 1)
    assert chosen == choose_off_targets(sorted(classes, reverse=True), count, seed)


def test_off_targets_cover_all_classes_in_the_long_run() -> None:
    drawn = [choose_off_targets(range(4), 1, seed)[0][0] for seed in range(60)]
    assert set(drawn) == {1, 2, 3}


def test_one_class_has_no_off_target() -> None:
    with pytest.raises(InterventionError, match="two classes"):
        choose_off_targets([3], 1, 0)


def test_channels_rank_by_signed_value_and_ties_by_number() -> None:
    assert rank_channels(torch.tensor([0.5, -9.0, 2.0, 0.5, 0.0])).tolist() == [2, 0, 3, 4, 1]
    with pytest.raises(InterventionError, match="channel 1 is not finite"):
        rank_channels(np.array([1.0, np.nan]))


@given(st.sets(st.integers(0, 30), min_size=4), st.integers(1, 5), st.integers(0, 99), st.data())
def test_a_class_that_is_missing_changes_no_other_choice(classes: set[int], count: int, seed: int, data) -> None:
    whole = choose_off_targets(sorted(classes), count, seed)
    missing = data.draw(st.sampled_from(sorted(classes)))
    fewer = choose_off_targets(sorted(classes - {missing}), count, seed)
    for target, others in fewer.items():
        if missing not in whole[target]:
            assert others == whole[target]
        assert set(whole[target]) - {missing} <= set(others)
    some = sorted(classes)[:2]
    assert choose_off_targets(sorted(classes), count, seed, some) == {target: whole[target] for target in some}


@given(st.sets(st.integers(0, 30)), st.integers(1, 40) | st.none(), st.integers(0, 99))
def test_targets_are_some_of_the_classes_and_fewer_are_some_of_more(classes: set[int], count, seed: int) -> None:
    chosen = choose_targets(sorted(classes), count, seed)
    assert len(chosen) == min(count or len(classes), len(classes))
    assert set(chosen) <= classes
    assert list(chosen) == sorted(chosen)
    if count and count > 1:
        assert set(choose_targets(sorted(classes, reverse=True), count - 1, seed)) <= set(chosen)


def test_targets_and_off_targets_differ_by_seed() -> None:
    assert len({choose_targets(range(100), 5, seed) for seed in range(20)}) == 20
    assert len({choose_off_targets(range(100), 5, seed)[0] for seed in range(20)}) == 20


def test_random_orders_are_permutations_of_each_layers_class_and_draw() -> None:
    orders = [
        random_order(64, layer, target, draw, 0) for layer in ("a", "b") for target in range(4) for draw in range(3)
    ]
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 24


def test_random_rankings_are_those_of_their_seed_layer_class_and_draw_whatever_else_is_tested() -> None:
    everything = {target: tuple(other for other in range(5) if other != target) for target in range(5)}

    def orders(targets: list[int], draws: int, modes: dict) -> dict:
        plan = plan_experiment(
            "layer", 16, modes, off_targets={t: everything[t] for t in targets}, percentages=(50,),
            random_draws=draws, seed=7,
        )  # fmt: skip
        random = [condition for condition in plan.conditions if condition.ranking == "random"]
        return {(c.target, c.draw): tuple(c.order.tolist()) for c in random}

    whole = orders([0, 1, 2, 3, 4], 4, {"mode": {0: torch.arange(16.0)}})
    assert len(set(whole.values())) == len(whole) == 20
    part = orders([3, 1], 2, {})
    assert part == {key: whole[key] for key in part}
    assert set(part) == {(target, draw) for target in (1, 3) for draw in (0, 1)}


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.integers(0, 100))
def test_ablate_and_preserve_divide_the_channels(size: tuple[int, int], seed: int) -> None:
    channels, count = size
    order = random_order(channels, "layer", 0, 0, seed)
    ablate, preserve = (
        Condition("random", 0, None, kind, count, order, (0,)).keep() for kind in ("ablate", "preserve")
    )
    assert set(np.flatnonzero(preserve)) == set(order[:count].tolist())
    assert (ablate != preserve).all()
    assert Condition("random", 0, None, "intact", 0, order, (0,)).keep().all()


def test_plan_asks_for_needed_classes_only_and_runs_equal_numbers_once() -> None:
    plan = plan_experiment(
        "blocks.0",
        8,
        {"contribution-positive": {0: torch.arange(8.0), 2: torch.zeros(8)}},
        off_targets={0: (2,), 1: (0, 3), 2: (1,)},
        percentages=(1, 2, 50),
        random_draws=3,
    )
    assert plan.counts == {1: 1, 2: 1, 50: 4}
    first, *rest = plan.conditions
    assert (first.kind, first.classes, first.keep().all()) == ("intact", (0, 1, 2, 3), True)
    modes = [condition for condition in rest if condition.ranking == "contribution-positive"]
    assert [(c.target, c.kind, c.count, c.classes) for c in modes] == [
        (target, kind, count, classes)
        for target, classes in ((0, (0, 2)), (2, (1, 2)))
        for kind in ("ablate", "preserve")
        for count in (1, 4)
    ]
    assert modes[1].channels.tolist() == [7, 6, 5, 4]
    randoms = rest[len(modes) :]
    assert len(randoms) == 3 * 3 * 2 * 2
    assert {c.target: c.classes for c in randoms} == {0: (0, 2), 1: (0, 1, 3), 2: (1, 2)}


def test_plan_of_many_classes_pickles_small() -> None:
    modes = {"contribution-positive": dict(enumerate(np.random.default_rng(0).normal(size=(50, 512))))}
    off_targets = choose_off_targets(range(50), 5, 0)
    plan = plan_experiment("layer", 512, modes, off_targets=off_targets, percentages=(1, 2, 5, 10, 18, 25, 50, 80, 99))
    restored = pickle.loads(pickle.dumps(plan))  # noqa: S301
    assert len(plan.conditions) == 1 + (50 + 50 * 20) * 2 * 9
    for ours, theirs in zip(plan.conditions, restored.conditions, strict=True):
        assert (ours.ranking, ours.target, ours.kind, ours.count) == (
            theirs.ranking, theirs.target, theirs.kind, theirs.count
        )  # fmt: skip
        assert (ours.order == theirs.order).all()
    # One int32 per channel and mode; random rankings are made where they are needed.
    assert len(pickle.dumps(plan)) < 50 * 512 * 4 + 20_000


@pytest.mark.parametrize(
    ("modes", "off_targets", "message"),
    [
        ({"contribution-positive": {0: torch.zeros(7)}}, {0: (1,)}, "shape"),
        ({"random": {0: torch.zeros(8)}}, {0: (1,)}, "rename"),
        ({"contribution-positive": {5: torch.zeros(8)}}, {0: (1,)}, "class 5"),
        ({}, {0: (0, 1)}, "other classes"),
        ({}, {0: ()}, "other classes"),
        ({}, {0: (1, 1)}, "each once"),
    ],
)
def test_senseless_plans_are_refused(modes: dict, off_targets: dict, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        plan_experiment("layer", 8, modes, off_targets=off_targets, percentages=(50,))
