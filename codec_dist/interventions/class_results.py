"""From counts to results per class, and to one pair of ratios per subject: the target class against its off-targets."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from codec_dist.interventions.counts import InterventionCounts, cell_offsets
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import INTACT, KINDS, Experiment

CLASSES = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("draw", pa.int32()),
        ("kind", pa.string()),
        ("channels", pa.int32()),
        ("target", pa.int32()),
        ("class", pa.int32()),
        ("images", pa.int64()),
        ("right_before", pa.int64()),
        ("right_after", pa.int64()),
    ]
)
SUBJECTS = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("draw", pa.int32()),
        ("kind", pa.string()),
        ("percentage", pa.float64()),
        ("channels", pa.int32()),
        ("target", pa.int32()),
        ("ratio_target", pa.float64()),
        ("ratio_off_target", pa.float64()),
        ("selectivity", pa.float64()),
    ]
)


@dataclass(frozen=True, eq=False)
class LayerResults:
    """What was counted at one layer."""

    classes: pa.Table
    """Schema ``CLASSES``: right answers before and after, per condition and class."""
    subjects: pa.Table
    """Schema ``SUBJECTS``: ratios per condition, percentage and target class."""


def layer_results(counts: InterventionCounts, experiment: Experiment) -> LayerResults:
    """The results of an experiment per class and per subject.

    The subject is the target class. Its ratio is right answers after / before; that of its off-target classes
    is the sum of theirs after / the sum of theirs before; the selectivity is (R − O) / (R + O). A ratio is null
    where nothing was right before, the selectivity where a ratio is null or both are 0.

    Returns:
        Both tables: classes in the order of the conditions, subjects by percentage and then in that order.

    Raises:
        InterventionError: the counts are of another experiment, or the intact model answers no image
            of any class rightly, so that nothing is defined.
    """
    classes = _class_results(counts, experiment)
    return LayerResults(classes, _subject_results(classes, experiment))


def _class_results(counts: InterventionCounts, experiment: Experiment) -> pa.Table:
    conditions = experiment.conditions
    offsets = cell_offsets(conditions)
    if counts.layer != experiment.layer or counts.correct.size != offsets[-1]:
        raise InterventionError(
            f"counts of {counts.layer} ({counts.correct.size} cells) are not of this experiment on "
            f"{experiment.layer} ({offsets[-1]} cells)"
        )
    before = next(index for index, condition in enumerate(conditions) if condition.kind == INTACT)
    intact = np.arange(offsets[before], offsets[before + 1])
    if not counts.correct[intact].sum():
        raise InterventionError(
            f"no ratio of accuracies is defined for {experiment.layer}: of {counts.total[intact].sum()} images of "
            f"{len(intact)} classes the unchanged model answers none rightly; check its weights, the preprocessing "
            "and the labels"
        )
    changed = [index for index, condition in enumerate(conditions) if condition.kind in KINDS]
    lengths = [len(conditions[index].classes) for index in changed]
    cells: Int[np.ndarray, "rows"] = np.concatenate(
        [np.arange(0), *(np.arange(offsets[index], offsets[index + 1]) for index in changed)]
    )
    class_numbers = np.concatenate([np.asarray(condition.classes, np.int32) for condition in conditions])

    def column(name: str, attribute: str) -> pa.Array:
        values = pa.array([getattr(conditions[index], attribute) for index in changed], CLASSES.field(name).type)
        return values.take(pa.array(np.repeat(np.arange(len(changed)), lengths)))

    place = intact[np.searchsorted(class_numbers[intact], class_numbers[cells])]
    columns = [pa.repeat(pa.scalar(experiment.layer), len(cells))]
    columns += [column(name, name) for name in ("ranking", "draw", "kind")]
    columns += [column("channels", "count"), column("target", "target")]
    columns += [pa.array(values) for values in (class_numbers[cells], counts.total[cells])]
    columns += [pa.array(counts.correct[place]), pa.array(counts.correct[cells])]
    return pa.Table.from_arrays(columns, schema=CLASSES)


def _subject_results(classes: pa.Table, experiment: Experiment) -> pa.Table:
    keys = ["layer", "ranking", "draw", "kind", "channels", "target"]
    own = classes["class"].to_numpy() == classes["target"].to_numpy()
    # The rows of a condition follow each other, and each has one of its target class.
    lengths = [
        1 + len(experiment.off_targets[target]) for target in classes["target"].filter(pa.array(own)).to_pylist()
    ]
    starts = np.cumsum([0, *lengths])[:-1]
    sums = classes.select(keys).take(starts)

    def total(rows: np.ndarray, when: str) -> Int[np.ndarray, "conditions"]:
        return np.add.reduceat(np.where(rows, classes[f"right_{when}"].to_numpy(), 0), starts)

    target, off_target = (_divide(total(rows, "after"), total(rows, "before")) for rows in (own, ~own))
    values = {"ratio_target": target, "ratio_off_target": off_target}
    values["selectivity"] = _divide(target - off_target, target + off_target)
    points = []
    for percentage, count in experiment.counts.items():
        rows = np.flatnonzero(sums["channels"].to_numpy() == count)
        point = {name: sums[name].take(rows) for name in keys}
        point |= {name: pa.array(value[rows], from_pandas=True) for name, value in values.items()}
        point["percentage"] = pa.repeat(pa.scalar(float(percentage)), len(rows))
        points.append(pa.Table.from_arrays([point[name] for name in SUBJECTS.names], schema=SUBJECTS))
    return pa.concat_tables(points)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> Float[np.ndarray, "conditions"]:
    """The quotient, nan where the denominator is 0 or nan."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient
