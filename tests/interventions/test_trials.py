"""Trials, curves and areas against numbers worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.interventions import (
    Experiment,
    InterventionCounts,
    InterventionError,
    areas,
    curves,
    plan_experiment,
    read_results,
    trials,
    write_results,
)
from codec_dist.interventions.trials import TRIALS


def make_experiment(**changes: object) -> Experiment:
    settings = {
        "modes": {"contribution-positive": {0: torch.arange(10.0)}},
        "off_targets": {0: (1, 2), 1: (0,)},
        "percentages": (10, 15, 50),
        "random_draws": 2,
    }
    return plan_experiment("layer", 10, **(settings | changes))  # type: ignore[arg-type]


def fill(experiment: Experiment, correct, total: int = 10) -> InterventionCounts:
    """Counts from a function of (condition, class)."""
    counts = InterventionCounts.empty("layer", experiment.conditions)
    counts.correct[:] = [correct(c, label) for c in experiment.conditions for label in c.classes]
    counts.total[:] = total
    return counts


def test_trials_are_ratios_of_accuracy_after_to_before() -> None:
    experiment = make_experiment()

    def correct(condition, label: int) -> int:
        if condition.kind == "intact":
            return {0: 8, 1: 5, 2: 0}[label]
        if condition.target == 0 and condition.kind == "ablate":
            return (4 if condition.count == 1 else 2) if label == 0 else 5
        return 3 + condition.draw

    rows = trials(fill(experiment, correct), experiment).to_pylist()
    # Three percentages, two kinds: two pairs under the mode, three under each random draw.
    assert len(rows) == 3 * 2 * (2 + 2 * 3)
    assert all(row["target"] != row["off_target"] for row in rows)
    mode = [row for row in rows if row["ranking"] == "contribution-positive" and row["kind"] == "ablate"]
    assert [(r["percentage"], r["channels"], r["off_target"], r["ratio_target"]) for r in mode] == [
        (10, 1, 1, 0.5),
        (10, 1, 2, 0.5),
        (15, 1, 1, 0.5),
        (15, 1, 2, 0.5),
        (50, 5, 1, 0.25),
        (50, 5, 2, 0.25),
    ]
    # Class 2 is never right before: its ratio is undefined, not infinite.
    assert [row["ratio_off_target"] for row in mode] == [1.0, None] * 3
    random = [row for row in rows if row["ranking"] == "random" and row["target"] == 1]
    assert {row["draw"] for row in random} == {0, 1}
    for row in random:
        assert row["ratio_target"] == pytest.approx((3 + row["draw"]) / 5)
        assert row["ratio_off_target"] == pytest.approx((3 + row["draw"]) / 8)


def test_class_without_images_is_undefined() -> None:
    experiment = make_experiment()
    counts = fill(experiment, lambda condition, label: 0 if label == 2 else 5)
    counts.total[:] = [0 if label == 2 else 10 for c in experiment.conditions for label in c.classes]
    table = trials(counts, experiment)
    undefined = [row["off_target"] for row in table.to_pylist() if row["ratio_off_target"] is None]
    assert set(undefined) == {2}


def test_no_right_answer_at_all_is_an_error() -> None:
    experiment = make_experiment()
    with pytest.raises(InterventionError, match="answers none rightly"):
        trials(fill(experiment, lambda condition, label: 0), experiment)


def test_counts_of_another_experiment_are_refused() -> None:
    experiment = make_experiment()
    other = make_experiment(random_draws=1)
    with pytest.raises(InterventionError, match="not of this experiment"):
        trials(fill(other, lambda condition, label: 1), experiment)


def test_merged_counts_are_the_sum() -> None:
    experiment = make_experiment()
    one, two = fill(experiment, lambda c, label: label), fill(experiment, lambda c, label: c.count, total=7)
    for array in (two.correct, two.total):
        array.flags.writeable = False
    expected = one.correct + two.correct
    merged = InterventionCounts.empty("layer", experiment.conditions).merge(two).merge(one)
    assert (merged.correct == expected).all()
    assert (merged.total == 17).all()
    with pytest.raises(InterventionError, match="do not add up"):
        merged.merge(InterventionCounts.empty("layer", experiment.conditions[:2]))


def trial_table(rows: list[tuple]) -> pa.Table:
    """Rows of (ranking, draw, percentage, target, off-target, ratio, ratio off)."""
    full = [("layer", r, d, "ablate", p, int(p), t, o, rt, ro) for r, d, p, t, o, rt, ro in rows]
    return pa.Table.from_pylist([dict(zip(TRIALS.names, row)) for row in full], schema=TRIALS)


def test_curves_average_trials_and_leave_out_undefined_ones() -> None:
    table = trial_table([("m", 0, 5, 0, 1, 0.2, 1.0), ("m", 0, 5, 0, 2, 0.4, None), ("m", 0, 5, 1, 0, 0.9, None)])
    target, off_target = curves(table).to_pylist()
    assert (target["role"], off_target["role"]) == ("target", "off_target")
    assert target["ratio"] == pytest.approx(0.5)
    assert target["standard_error"] == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1) / 3**0.5)
    assert target["trials"] == 3
    assert (off_target["ratio"], off_target["standard_error"], off_target["trials"]) == (1.0, None, 1)


def test_random_draws_are_averaged_within_a_trial() -> None:
    rows = [("random", draw, 5, target, 9, target + draw, 1.0) for draw in range(4) for target in range(3)]
    target, _ = curves(trial_table(rows)).to_pylist()
    assert target["trials"] == 3
    assert target["ratio"] == pytest.approx(1 + 1.5)
    assert target["standard_error"] == pytest.approx(np.std([0, 1, 2], ddof=1) / 3**0.5)


def test_areas_are_trapezoids_over_the_fraction_of_channels() -> None:
    table = trial_table([("m", 0, 50, 0, 1, 0.2, 0.8), ("m", 0, 10, 0, 1, 0.6, 1.0), ("m", 0, 20, 0, 1, 0.4, 0.9)])
    (row,) = areas(curves(table)).to_pylist()
    assert row["auc_target"] == pytest.approx(0.1 * 0.5 + 0.3 * 0.3)
    assert row["auc_off_target"] == pytest.approx(0.1 * 0.95 + 0.3 * 0.85)
    assert row["relative_auc"] == pytest.approx((0.14 - 0.35) / 0.35)


@given(st.floats(0, 2), st.floats(0.01, 2), st.lists(st.integers(1, 100), min_size=2, unique=True))
def test_relative_area_of_constant_curves_is_their_relative_difference(a: float, b: float, where: list[int]) -> None:
    (row,) = areas(curves(trial_table([("m", 0, p, 0, 1, a, b) for p in where]))).to_pylist()
    assert row["relative_auc"] == pytest.approx((a - b) / b, abs=1e-9)


@pytest.mark.parametrize(
    "points",
    [
        [(5, 0.5, 1.0)],
        [(5, 0.5, None), (10, 0.5, 1.0)],
        [(5, 0.5, 0.0), (10, 0.5, 0.0)],
    ],
    ids=["one point", "undefined point", "nothing to compare with"],
)
def test_areas_are_undefined_where_they_make_no_sense(points: list[tuple]) -> None:
    (row,) = areas(curves(trial_table([("m", 0, p, 0, 1, a, b) for p, a, b in points]))).to_pylist()
    assert row["relative_auc"] is None


def test_files_come_back_as_written(tmp_path) -> None:
    experiment = make_experiment()
    table = trials(fill(experiment, lambda condition, label: 1 + label), experiment)
    written = write_results(tmp_path / "interventions", [table])
    assert sorted(file.name for file in (tmp_path / "interventions").iterdir()) == [
        "auc.parquet",
        "curves.parquet",
        "trials.parquet",
    ]
    restored = read_results(tmp_path / "interventions")
    assert restored.trials == written.trials == table
    assert restored.curves == written.curves == curves(table)
    assert restored.auc == written.auc == areas(curves(table))


def test_missing_or_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(InterventionError, match="run the stage"):
        read_results(tmp_path)
    write_results(tmp_path, [])
    assert read_results(tmp_path).trials.num_rows == 0
    (tmp_path / "auc.parquet").write_bytes((tmp_path / "curves.parquet").read_bytes())
    with pytest.raises(InterventionError, match="columns"):
        read_results(tmp_path)
