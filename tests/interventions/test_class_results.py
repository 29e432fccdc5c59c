"""Results per class and ratios of subjects, against numbers worked out by hand; the files of the stage."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from codec_dist.interventions import (
    Experiment,
    InterventionCounts,
    InterventionError,
    areas,
    curves,
    layer_results,
    nulls,
    plan_experiment,
    read_results,
    results_are_current,
    write_results,
)

FILES = ["auc.parquet", "classes.parquet", "curves.parquet", "nulls.parquet", "subjects.parquet"]


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


def test_a_subjects_ratio_is_its_own_and_that_of_off_targets_is_of_sums() -> None:
    experiment = make_experiment()

    def correct(condition, label: int) -> int:
        if condition.kind == "intact":
            return {0: 8, 1: 5, 2: 1}[label]
        if condition.ranking == "random":
            return 3 + condition.draw
        if condition.kind == "preserve":
            return 0
        return {0: 4 if condition.count == 1 else 2, 1: 5, 2: 0}[label]

    rows = layer_results(fill(experiment, correct), experiment).subjects.to_pylist()
    # Three percentages and two kinds: one subject under the mode, two under each random draw.
    assert len(rows) == 3 * 2 * (1 + 2 * 2)
    mode = [row for row in rows if row["ranking"] == "contribution-positive"]
    ablate = [row for row in mode if row["kind"] == "ablate"]
    assert [(r["percentage"], r["channels"], r["target"], r["ratio_target"]) for r in ablate] == [
        (10, 1, 0, 4 / 8),
        (15, 1, 0, 4 / 8),
        (50, 5, 0, 2 / 8),
    ]
    # The sums of both off-target classes, (5 + 0) / (5 + 1), and not the mean of 1 and 0.
    assert [row["ratio_off_target"] for row in ablate] == pytest.approx([5 / 6] * 3)
    assert ablate[2]["selectivity"] == pytest.approx((1 / 4 - 5 / 6) / (1 / 4 + 5 / 6))
    # Where nothing is right after, neither class is favoured: that is not defined.
    nothing = [(r["ratio_target"], r["ratio_off_target"], r["selectivity"]) for r in mode if r["kind"] == "preserve"]
    assert nothing == [(0, 0, None)] * 3
    for row in (row for row in rows if row["ranking"] == "random"):
        own, others = (8, 6) if row["target"] == 0 else (5, 8)
        right = 3 + row["draw"]
        assert row["ratio_target"] == pytest.approx(right / own)
        assert row["ratio_off_target"] == pytest.approx(right * (2 if row["target"] == 0 else 1) / others)


def test_results_per_class_are_the_counts() -> None:
    experiment = make_experiment()
    counts = fill(experiment, lambda condition, label: 7 if condition.kind == "intact" else label, total=9)
    table = layer_results(counts, experiment).classes
    rows = table.to_pylist()
    changed = experiment.conditions[1:]
    expected = [
        (c.ranking, c.draw, c.kind, c.count, c.target, label, 9, 7, label) for c in changed for label in c.classes
    ]
    assert [tuple(row.values())[1:] for row in rows] == expected
    assert {row["layer"] for row in rows} == {"layer"}


def test_what_was_never_right_before_is_undefined_and_not_infinite() -> None:
    experiment = make_experiment(off_targets={0: (2,), 1: (0,), 2: (0, 1)})
    never_right = fill(experiment, lambda c, label: 0 if label == 2 and c.kind == "intact" else 5)
    without_images = fill(experiment, lambda condition, label: 0 if label == 2 else 5)
    without_images.total[:] = [0 if label == 2 else 10 for c in experiment.conditions for label in c.classes]
    for counts in (never_right, without_images):
        rows = layer_results(counts, experiment).subjects.to_pylist()
        assert {row["target"] for row in rows if row["ratio_target"] is None} == {2}
        assert {row["target"] for row in rows if row["ratio_off_target"] is None} == {0}
        assert {row["target"] for row in rows if row["selectivity"] is None} == {0, 2}


def test_rows_are_in_the_order_of_the_conditions_however_many_there_are() -> None:
    targets = range(40)
    experiment = make_experiment(
        modes={name: {target: torch.rand(10) for target in targets} for name in ("b", "a")},
        off_targets={target: ((target + 1) % 40, (target + 2) % 40) for target in targets},
    )
    results = layer_results(fill(experiment, lambda condition, label: 5), experiment)
    expected = [
        (percentage, c.ranking, c.target, c.draw, c.kind)
        for percentage, number in experiment.counts.items()
        for c in experiment.conditions[1:]
        if c.count == number
    ]
    names = ("percentage", "ranking", "target", "draw", "kind")
    assert [tuple(row[name] for name in names) for row in results.subjects.to_pylist()] == expected
    found = [(row["ranking"], row["kind"]) for row in areas(results.subjects, 0).to_pylist()]
    assert found == [(ranking, kind) for ranking in ("b", "a", "random") for kind in ("ablate", "preserve")]


def test_no_right_answer_at_all_is_an_error() -> None:
    experiment = make_experiment()
    with pytest.raises(InterventionError, match="answers none rightly"):
        layer_results(fill(experiment, lambda condition, label: 0), experiment)


def test_counts_of_another_experiment_are_refused() -> None:
    experiment = make_experiment()
    other = make_experiment(random_draws=1)
    with pytest.raises(InterventionError, match="not of this experiment"):
        layer_results(fill(other, lambda condition, label: 1), experiment)


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


def test_files_come_back_as_written(tmp_path) -> None:
    experiment = make_experiment()
    results = layer_results(fill(experiment, lambda condition, label: 1 + label), experiment)
    folder = tmp_path / "interventions"
    assert not results_are_current(folder)
    written = write_results(folder, [results], seed=3)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    restored = read_results(folder)
    assert restored.classes == written.classes == results.classes
    assert restored.subjects == written.subjects == results.subjects
    assert restored.curves == written.curves == curves(results.subjects)
    assert restored.auc == written.auc == areas(results.subjects, 3)
    assert restored.nulls == written.nulls == nulls(results.subjects)
    assert results_are_current(folder)
    assert restored.nulls.num_rows > 0


def test_missing_or_unexpected_files_are_refused(tmp_path) -> None:
    with pytest.raises(InterventionError, match="run the stage"):
        read_results(tmp_path)
    write_results(tmp_path, [], seed=0)
    assert read_results(tmp_path).subjects.num_rows == 0
    (tmp_path / "auc.parquet").write_bytes((tmp_path / "curves.parquet").read_bytes())
    with pytest.raises(InterventionError, match="columns"):
        read_results(tmp_path)


def test_files_of_an_earlier_format_are_recognised_and_replaced(tmp_path) -> None:
    write_results(tmp_path, [], seed=0)
    # The same columns may mean something else in another format.
    for mark in (None, {"format": "1"}):
        table = pq.read_table(tmp_path / "curves.parquet").replace_schema_metadata(mark)
        pq.write_table(table, tmp_path / "curves.parquet")
        assert not results_are_current(tmp_path)
        with pytest.raises(InterventionError, match=r"curves\.parquet is not of format"):
            read_results(tmp_path)
    (tmp_path / "curves.parquet").write_bytes(b"torn")
    assert not results_are_current(tmp_path)
    pq.write_table(pa.table({"ratio_target": np.zeros(3)}), tmp_path / "trials.parquet")
    write_results(tmp_path, [], seed=0)
    assert results_are_current(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
