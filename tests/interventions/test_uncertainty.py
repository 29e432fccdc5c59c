"""Means, errors, intervals and nulls, against a slow reimplementation in exact fractions and planted networks."""

import itertools
import statistics
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.interventions import (
    Experiment,
    InterventionCounts,
    ablate,
    areas,
    choose_off_targets,
    count_correct,
    curves,
    layer_results,
    nulls,
    plan_experiment,
    preserve,
    random_order,
)
from codec_dist.interventions.class_results import SUBJECTS

Ratio = Fraction | None
CHANNELS = 20


def mean(values: list[Ratio]) -> Ratio:
    known = [value for value in values if value is not None]
    return sum(known, Fraction(0)) / len(known) if known else None


def error(values: list[Ratio]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def trapezoid(points: list[tuple[Fraction, Ratio]]) -> Ratio:
    if len(points) < 2 or any(value is None for _, value in points):
        return None
    pairs = itertools.pairwise(points)
    return sum(((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairs), Fraction(0))


def relative(target: Ratio, off_target: Ratio) -> Ratio:
    return (target - off_target) / off_target if target is not None and off_target else None


class Oracle:
    """All statistics of an experiment from right answers by (ranking, draw, kind, number, target, class)."""

    def __init__(self, experiment: Experiment, before: dict, after: dict) -> None:
        self.experiment, self.before, self.after = experiment, before, after
        self.points = [(Fraction(str(p)) / 100, n) for p, n in sorted(experiment.counts.items())]

    def ratio(self, ranking: str, draw: int, kind: str, number: int, target: int, role: str) -> Ratio:
        if role == "selectivity":
            r, o = (self.ratio(ranking, draw, kind, number, target, one) for one in ("target", "off_target"))
            return None if r is None or o is None or r + o == 0 else (r - o) / (r + o)
        classes = [target] if role == "target" else self.experiment.off_targets[target]
        before = sum(self.before[label] for label in classes)
        after = sum(self.after[ranking, draw, kind, number, target, label] for label in classes)
        return Fraction(after, before) if before else None

    def targets(self, ranking: str) -> list[int]:
        return sorted(self.experiment.off_targets if ranking == "random" else self.experiment.rankings[ranking])

    def draws(self, ranking: str) -> range:
        return range(self.experiment.random_draws if ranking == "random" else 1)

    def of_subjects(self, ranking: str, kind: str, number: int, role: str) -> list[Ratio]:
        """Draws averaged within each subject."""
        return [
            mean([self.ratio(ranking, draw, kind, number, target, role) for draw in self.draws(ranking)])
            for target in self.targets(ranking)
        ]

    def areas(self, ranking: str, kind: str) -> list[tuple[Ratio, Ratio]]:
        by_role = [
            [trapezoid(list(zip([x for x, _ in self.points], values)))
             for values in zip(*(self.of_subjects(ranking, kind, number, role) for _, number in self.points))]
            for role in ("target", "off_target")
        ]  # fmt: skip
        return list(zip(*by_role))

    def statistics(self, ranking: str, draw: int, kind: str, targets: list[int]) -> dict:
        """What is tested, for one draw and some subjects."""
        areas = [
            tuple(
                trapezoid([(x, self.ratio(ranking, draw, kind, n, target, role)) for x, n in self.points])
                for role in ("target", "off_target")
            )
            for target in targets
        ]
        found = {
            ("relative_auc", None): relative(mean([t for t, _ in areas]), mean([o for _, o in areas])),
            ("relative_auc_mean", None): mean([relative(t, o) for t, o in areas]),
        }
        for percentage, number in self.experiment.counts.items():
            values = [self.ratio(ranking, draw, kind, number, target, "selectivity") for target in targets]
            found["selectivity", float(percentage)] = mean(values)
        return found


CASES = st.fixed_dictionaries(
    {
        "classes": st.integers(2, 4),
        "without_mode": st.integers(0, 4),
        "off_targets": st.integers(1, 3),
        "percentages": st.lists(st.sampled_from([5, 7.5, 20, 50]), min_size=1, max_size=3, unique=True),
        "draws": st.integers(0, 4),
        "most": st.integers(1, 4),
        "seed": st.integers(0, 2**32),
    }
)


def make_case(case: dict) -> tuple[Experiment, InterventionCounts, Oracle]:
    """Any right answers, of a few classes under a few conditions; one class may lack a mode of one kind."""
    classes = range(case["classes"])
    some = [target for target in classes if target != case["without_mode"]]
    modes = {"contribution-positive": some, "activation-positive": classes}
    experiment = plan_experiment(
        "layer",
        CHANNELS,
        {name: {target: np.arange(float(CHANNELS)) for target in targets} for name, targets in modes.items()},
        off_targets=choose_off_targets(classes, case["off_targets"], 0),
        percentages=case["percentages"],
        random_draws=case["draws"],
    )
    generator, most = np.random.default_rng(case["seed"]), case["most"]
    # Few images: zeros, ties and undefined ratios are frequent.
    before = {label: int(generator.integers(0, most + 1)) for label in classes}
    before[int(generator.integers(len(classes)))] = most
    counts = InterventionCounts.empty("layer", experiment.conditions)
    counts.total[:] = most
    cells = [(condition, label) for condition in experiment.conditions for label in condition.classes]
    after = {}
    for cell, (condition, label) in enumerate(cells):
        right = (
            before[label] if condition.kind == "intact" else min(int(generator.integers(0, before[label] + 2)), most)
        )
        counts.correct[cell] = right
        after[condition.ranking, condition.draw, condition.kind, condition.count, condition.target, label] = right
    return experiment, counts, Oracle(experiment, before, after)


def near(value: object) -> object:
    return None if value is None else pytest.approx(float(value), rel=1e-9, abs=1e-12)


@given(CASES)
def test_curves_are_means_over_subjects_with_their_standard_errors(case: dict) -> None:
    experiment, counts, oracle = make_case(case)
    rows = curves(layer_results(counts, experiment).subjects).to_pylist()
    rankings = [*experiment.rankings, *(["random"] if experiment.random_draws else [])]
    assert len(rows) == len(rankings) * 2 * 3 * len(experiment.counts)
    for row in rows:
        number = experiment.counts[row["percentage"]]
        values = oracle.of_subjects(row["ranking"], row["kind"], number, row["role"])
        assert row["channels"] == number
        assert row["ratio"] == near(mean(values))
        assert row["standard_error"] == near(error(values))
        assert row["subjects"] == sum(value is not None for value in values)


@given(CASES)
def test_areas_are_those_of_the_mean_curves_and_of_each_subjects(case: dict) -> None:
    experiment, counts, oracle = make_case(case)
    for row in areas(layer_results(counts, experiment).subjects, seed=0).to_pylist():
        of_subjects = oracle.areas(row["ranking"], row["kind"])
        target, off_target = ([one[side] for one in of_subjects] for side in (0, 1))
        own = [relative(*one) for one in of_subjects]
        assert row["auc_target"] == near(mean(target))
        assert row["auc_target_standard_error"] == near(error(target))
        assert row["auc_off_target"] == near(mean(off_target))
        assert row["auc_off_target_standard_error"] == near(error(off_target))
        assert row["relative_auc"] == near(relative(mean(target), mean(off_target)))
        assert row["relative_auc_mean"] == near(mean(own))
        assert row["relative_auc_standard_error"] == near(error(own))
        assert row["subjects"] == sum(value is not None for value in own)
        if row["relative_auc_low"] is not None:
            assert row["relative_auc_low"] <= row["relative_auc_high"]


@given(CASES)
def test_nulls_are_each_statistic_of_each_draw_of_the_same_subjects(case: dict) -> None:
    experiment, counts, oracle = make_case(case)
    rows = nulls(layer_results(counts, experiment).subjects).to_pylist()
    tried = len(experiment.rankings) * 2 * (2 + len(experiment.counts))
    assert len(rows) == (tried if experiment.random_draws else 0)
    for row in rows:
        key, targets = (row["statistic"], row["percentage"]), oracle.targets(row["ranking"])
        observed = oracle.statistics(row["ranking"], 0, row["kind"], targets)[key]
        drawn = [oracle.statistics("random", d, row["kind"], targets)[key] for d in range(experiment.random_draws)]
        drawn = [value for value in drawn if value is not None]
        assert row["observed"] == near(observed)
        assert row["draws"] == len(drawn)
        assert row["mean"] == near(mean(drawn))
        assert row["standard_deviation"] == (near(statistics.stdev(map(float, drawn))) if len(drawn) > 1 else None)
        low, high = np.percentile([float(value) for value in drawn], [2.5, 97.5]) if drawn else (None, None)
        assert (row["low"], row["high"]) == (near(low), near(high))
        # Ablating a class's own channels makes its ratio the smaller one, preserving them the larger one.
        assert row["tail"] == {"ablate": "lower", "preserve": "upper"}[row["kind"]]
        expected = None
        if observed is not None and drawn:
            extreme = [v <= observed if row["kind"] == "ablate" else v >= observed for v in drawn]
            expected = Fraction(1 + sum(extreme), len(drawn) + 1)
        assert row["p"] == near(expected)


def subject_table(rows: Iterator[tuple] | list[tuple]) -> pa.Table:
    """Rows of (ranking, draw, percentage, target, ratio, ratio of off-targets)."""
    full = [("layer", r, d, "ablate", p, int(p), t, a, b, (a - b) / (a + b)) for r, d, p, t, a, b in rows]
    return pa.Table.from_pylist([dict(zip(SUBJECTS.names, row)) for row in full], schema=SUBJECTS)


def test_areas_are_trapezoids_over_the_fraction_of_channels() -> None:
    table = subject_table([("m", 0, 50, 0, 0.2, 0.8), ("m", 0, 10, 0, 0.6, 1.0), ("m", 0, 20, 0, 0.4, 0.9)])
    (row,) = areas(table, 0).to_pylist()
    assert row["auc_target"] == pytest.approx(0.1 * 0.5 + 0.3 * 0.3)
    assert row["auc_off_target"] == pytest.approx(0.1 * 0.95 + 0.3 * 0.85)
    assert row["relative_auc"] == pytest.approx((0.14 - 0.35) / 0.35)
    # A single subject has no spread.
    assert (row["relative_auc_low"], row["relative_auc_high"], row["relative_auc_standard_error"]) == (None,) * 3


def spread_subjects(count: int) -> tuple[pa.Table, np.ndarray]:
    """Subjects with ratios that vary, and their areas under both curves (one of width 1/2, constant)."""
    generator = np.random.default_rng(5)
    ratios = np.stack([generator.uniform(0, 1, count), generator.uniform(0.5, 1, count)])
    rows = [("m", 0, p, target, *ratios[:, target]) for p in (10, 60) for target in range(count)]
    return subject_table(rows), ratios / 2


def test_the_interval_is_the_percentile_bootstrap_over_subjects() -> None:
    table, of_subjects = spread_subjects(30)
    (row,) = areas(table, 0).to_pylist()

    def statistic(target: np.ndarray, off_target: np.ndarray, axis: int) -> np.ndarray:
        return target.mean(axis=axis) / off_target.mean(axis=axis) - 1

    other = scipy.stats.bootstrap(
        tuple(of_subjects), statistic, paired=True, n_resamples=20_000, method="percentile", vectorized=True, rng=1
    ).confidence_interval
    width = other.high - other.low
    assert row["relative_auc_low"] == pytest.approx(other.low, abs=0.08 * width)
    assert row["relative_auc_high"] == pytest.approx(other.high, abs=0.08 * width)
    assert row["relative_auc_low"] < row["relative_auc"] < row["relative_auc_high"]


def test_the_interval_of_two_subjects_spans_what_they_can_give() -> None:
    table = subject_table([("m", 0, p, t, (0.2, 0.6)[t], (1.0, 0.5)[t]) for p in (10, 60) for t in (0, 1)])
    (row,) = areas(table, 0).to_pylist()
    # Resamples are (0, 0), (0, 1), (1, 0) and (1, 1), each one time in four.
    assert (row["relative_auc_low"], row["relative_auc_high"]) == (pytest.approx(-0.8), pytest.approx(0.2))


def test_the_interval_depends_on_its_seed_alone() -> None:
    table, _ = spread_subjects(12)
    assert areas(table, 1) == areas(table, 1) == areas(table.take(np.random.default_rng(0).permutation(24)), 1)
    assert areas(table, 1) != areas(table, 2)


class Planted(nn.Module):
    """Class c is read, with equal weights, from channels of its own."""

    def __init__(self, classes: int, channels_each: int) -> None:
        super().__init__()
        self.hidden = nn.Identity()
        self.read = nn.Linear(classes * channels_each, classes, bias=False)
        self.read.weight.data = torch.eye(classes).repeat_interleave(channels_each, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.read(self.hidden(images))


GROUPS, EACH, DRAWS = 4, 10, 19


@pytest.fixture(scope="module")
def planted() -> tuple[Planted, Tensor, Tensor]:
    """The network, and images in which the channels of the image's class are on and all others half on."""
    model = Planted(GROUPS, EACH).eval()
    labels = torch.arange(GROUPS).repeat(5)
    half = torch.rand(len(labels), GROUPS * EACH, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    return model, torch.where(model.read.weight[labels] > 0, 1.0, half), labels


def planted_results(planted: tuple[Planted, Tensor, Tensor], percentages: tuple[float, ...]) -> pa.Table:
    model, images, labels = planted
    experiment = plan_experiment(
        "hidden",
        GROUPS * EACH,
        {"contribution-positive": dict(enumerate(model.read.weight.data))},
        off_targets=choose_off_targets(range(GROUPS), GROUPS - 1, 0),
        percentages=percentages,
        random_draws=DRAWS,
    )
    counts = count_correct(model, "hidden", images, labels, experiment.conditions)
    return layer_results(counts, experiment).subjects


def test_a_planted_classs_channels_are_found_by_ablating_and_by_preserving(planted) -> None:
    subjects = planted_results(planted, (100 / GROUPS,))
    of_mode = {
        (row["kind"], row["role"]): (row["ratio"], row["standard_error"], row["subjects"])
        for row in curves(subjects).to_pylist()
        if row["ranking"] == "contribution-positive"
    }
    assert of_mode == {
        ("ablate", "target"): (0, 0, GROUPS),
        ("ablate", "off_target"): (1, 0, GROUPS),
        ("ablate", "selectivity"): (-1, 0, GROUPS),
        ("preserve", "target"): (1, 0, GROUPS),
        ("preserve", "off_target"): (0, 0, GROUPS),
        ("preserve", "selectivity"): (1, 0, GROUPS),
    }
    found = {row["kind"]: row for row in nulls(subjects).to_pylist() if row["statistic"] == "selectivity"}
    for row in found.values():
        assert row["draws"] == DRAWS
        assert row["p"] == pytest.approx(1 / (DRAWS + 1))
        assert -1 < row["low"] <= row["mean"] <= row["high"] < 1


def test_the_null_of_a_planted_effect_is_beaten_by_every_area(planted) -> None:
    subjects = planted_results(planted, (10, 25, 50))
    rows = nulls(subjects).to_pylist()
    of_areas = [row for row in rows if row["statistic"] in ("relative_auc", "relative_auc_mean")]
    assert len(of_areas) == 4
    for row in of_areas:
        assert row["p"] == pytest.approx(1 / (DRAWS + 1)), row
        assert row["standard_deviation"] > 0
        assert row["observed"] < row["low"] if row["kind"] == "ablate" else row["observed"] > row["high"]


def test_one_permutation_for_all_classes_gave_no_spread_and_own_permutations_do(planted) -> None:
    model, images, labels = planted
    percentage = 50
    shared = []
    for draw in range(DRAWS):
        chosen = random_order(GROUPS * EACH, "hidden", 0, draw, 1)[: GROUPS * EACH * percentage // 100]
        with torch.no_grad(), ablate(model, "hidden", chosen):
            right = (model(images).argmax(dim=1) == labels).double()
        own = torch.stack([right[labels == label].mean() for label in range(GROUPS)])
        others = (own.sum() - own) / (GROUPS - 1)
        shared.append(float(own.mean() - others.mean()))
    # The mean over classes of all the others is the mean over classes, whatever was ablated.
    assert max(map(abs, shared)) < 1e-12
    subjects = planted_results(planted, (percentage, 60))
    spread = {row["kind"]: row["standard_deviation"] for row in nulls(subjects).to_pylist() if not row["percentage"]}
    assert min(spread.values()) > 0.01


def test_counts_of_random_rankings_are_those_of_each_classs_own_permutation(planted) -> None:
    model, images, labels = planted
    number = GROUPS * EACH // 2
    rows = planted_results(planted, (50,)).to_pylist()
    random = {(r["kind"], r["target"], r["draw"]): r for r in rows if r["ranking"] == "random"}
    assert len(random) == 2 * GROUPS * DRAWS
    for (kind, target, draw), row in random.items():
        chosen = random_order(GROUPS * EACH, "hidden", target, draw, 0)[:number]
        with torch.no_grad(), (ablate if kind == "ablate" else preserve)(model, "hidden", chosen):
            right = model(images).argmax(dim=1) == labels
        assert row["ratio_target"] == pytest.approx(float(right[labels == target].double().mean()))
        assert row["ratio_off_target"] == pytest.approx(float(right[labels != target].double().mean()))


@settings(max_examples=20)
@given(st.integers(2, 12), st.integers(0, 99))
def test_more_off_targets_do_not_make_the_error_smaller(count: int, seed: int) -> None:
    """The unit is the subject: what many off-target classes say of one target class is said once."""
    right = np.random.default_rng(seed).integers(0, 11, count)
    errors = []
    for off_targets in (1, count - 1):
        experiment = plan_experiment(
            "layer",
            CHANNELS,
            {"m": {target: np.arange(float(CHANNELS)) for target in range(count)}},
            off_targets=choose_off_targets(range(count), off_targets, 0),
            percentages=(50,),
            random_draws=0,
        )
        counts = InterventionCounts.empty("layer", experiment.conditions)
        counts.total[:] = 10
        counts.correct[:] = [
            10 if c.kind == "intact" or label != c.target else right[label]
            for c in experiment.conditions
            for label in c.classes
        ]
        row = curves(layer_results(counts, experiment).subjects).to_pylist()[0]
        assert row["role"] == "target"
        errors.append(row["standard_error"])
    assert errors == [pytest.approx(np.std(right / 10, ddof=1) / count**0.5)] * 2
