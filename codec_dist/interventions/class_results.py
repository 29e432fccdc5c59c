"""From counts to results per class, and to one pair of ratios per subject; and the Parquet files of the stage."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import INTACT, KINDS, Experiment
from codec_dist.interventions.running import InterventionCounts, cell_offsets
from codec_dist.interventions.uncertainty import AREAS, CURVES, NULLS, areas, curves, nulls
from codec_dist.utils import read_tables, write_bytes_atomically

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

RESULTS_FORMAT = 2
"""Number of the files' format. Format 1 counted a subject once per off-target class and had no nulls."""
_MARK = {b"format": str(RESULTS_FORMAT).encode()}
SCHEMAS = {
    name: schema.with_metadata(_MARK)
    for name, schema in (
        ("classes", CLASSES), ("subjects", SUBJECTS), ("curves", CURVES), ("auc", AREAS), ("nulls", NULLS)
    )
}  # fmt: skip
EARLIER_FILES = ("trials.parquet",)


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


# ---- The Parquet files that the stage leaves


@dataclass(frozen=True, eq=False)
class InterventionResults:
    """The causal tests of a run."""

    classes: pa.Table
    """Right answers per condition and class: layer, ranking, draw, kind, channels, target, class, images,
    right_before, right_after."""
    subjects: pa.Table
    """Ratios of each subject: layer, ranking, draw, kind, percentage, channels, target, ratio_target,
    ratio_off_target, selectivity."""
    curves: pa.Table
    """Means over subjects: layer, ranking, kind, percentage, channels, role, ratio, standard_error, subjects."""
    auc: pa.Table
    """Areas under the curves and relative AUC with its uncertainty, see :func:`areas`."""
    nulls: pa.Table
    """Statistics beside those of random rankings, see :func:`nulls`."""


def write_results(directory: Path, layers: Sequence[LayerResults], seed: int) -> InterventionResults:
    """Compute curves, areas and nulls, and write ``NAME.parquet`` for each table, each whole or not at all.

    Args:
        directory: folder of the stage; made when missing. Files of an earlier format are removed.
        layers: results as :func:`layer_results` returns them.
        seed: seed of the bootstrap.
    """
    classes = pa.concat_tables([CLASSES.empty_table(), *(layer.classes for layer in layers)])
    subjects = pa.concat_tables([SUBJECTS.empty_table(), *(layer.subjects for layer in layers)])
    results = InterventionResults(classes, subjects, curves(subjects), areas(subjects, seed), nulls(subjects))
    for name in SCHEMAS:
        buffer = io.BytesIO()
        pq.write_table(getattr(results, name).replace_schema_metadata(_MARK), buffer)
        write_bytes_atomically(Path(directory) / f"{name}.parquet", buffer.getvalue())
    for name in EARLIER_FILES:
        (Path(directory) / name).unlink(missing_ok=True)
    return results


def read_results(directory: Path) -> InterventionResults:
    """Read what :func:`write_results` wrote.

    Raises:
        InterventionError: a file is missing, is not such a table, or is of another format.
    """
    tables = read_tables(directory, SCHEMAS, InterventionError, "intervene")
    for name, table in tables.items():
        if not _is_current(table.schema):
            path = Path(directory) / f"{name}.parquet"
            raise InterventionError(f"{path} is not of format {RESULTS_FORMAT}: run the stage `intervene` again")
    return InterventionResults(**tables)


def results_are_current(directory: Path) -> bool:
    """Whether all files are there, can be read, and are of the present format; looks at their headers only."""
    try:
        return all(_is_current(pq.read_schema(Path(directory) / f"{name}.parquet")) for name in SCHEMAS)
    except (OSError, pa.ArrowInvalid):
        return False


def _is_current(schema: pa.Schema) -> bool:
    return (schema.metadata or {}).get(b"format") == _MARK[b"format"]
