"""From counts to trials (one target class against one off-target class), curves and areas under them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from codec_dist.interventions.counts import InterventionCounts, cell_offsets
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import INTACT, KINDS, Condition, Experiment

TRIALS = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("draw", pa.int32()),
        ("kind", pa.string()),
        ("percentage", pa.float64()),
        ("channels", pa.int32()),
        ("target", pa.int32()),
        ("off_target", pa.int32()),
        ("ratio_target", pa.float64()),
        ("ratio_off_target", pa.float64()),
    ]
)
CURVES = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("kind", pa.string()),
        ("percentage", pa.float64()),
        ("channels", pa.int32()),
        ("role", pa.string()),
        ("ratio", pa.float64()),
        ("standard_error", pa.float64()),
        ("trials", pa.int64()),
    ]
)
AREAS = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("kind", pa.string()),
        ("auc_target", pa.float64()),
        ("auc_off_target", pa.float64()),
        ("relative_auc", pa.float64()),
    ]
)
ROLES = ("target", "off_target")


def trials(counts: InterventionCounts, experiment: Experiment) -> pa.Table:
    """Every trial of an experiment: ratios accuracy after / before of a target and an off-target class.

    A ratio is null where the accuracy before is 0, or where no image of the class was seen.

    Returns:
        A table with the schema ``TRIALS``, ordered by condition, percentage, target, off-target.

    Raises:
        InterventionError: the counts are of another experiment, or the intact model answers no image
            of any class rightly, so that nothing is defined.
    """
    offsets = cell_offsets(experiment.conditions)
    if counts.layer != experiment.layer or counts.correct.size != offsets[-1]:
        raise InterventionError(
            f"counts of {counts.layer} ({counts.correct.size} cells) are not of this experiment on "
            f"{experiment.layer} ({offsets[-1]} cells)"
        )
    before = next(index for index, condition in enumerate(experiment.conditions) if condition.kind == INTACT)
    classes = np.asarray(experiment.conditions[before].classes)
    accuracy_before = _accuracy(counts, slice(offsets[before], offsets[before + 1]))
    if not np.nansum(accuracy_before):
        seen = int(counts.total[offsets[before] : offsets[before + 1]].sum())
        raise InterventionError(
            f"no ratio of accuracies is defined for {experiment.layer}: of {seen} images of {len(classes)} classes the "
            "unchanged model answers none rightly; check its weights, the preprocessing and the labels"
        )
    parts = []
    for index, condition in enumerate(experiment.conditions):
        if condition.kind not in KINDS:
            continue
        own = np.asarray(condition.classes)
        after = _accuracy(counts, slice(offsets[index], offsets[index + 1]))
        ratio = np.full(classes.max() + 1, np.nan)
        ratio[own] = _divide(after, accuracy_before[np.searchsorted(classes, own)])
        for percentage, count in experiment.counts.items():
            if count == condition.count:
                parts.append(_rows(experiment, condition, percentage, ratio))
    return pa.concat_tables(parts) if parts else TRIALS.empty_table()


def curves(table: pa.Table) -> pa.Table:
    """Mean ratio over trials, with its standard error, per layer, ranking, kind, percentage and role.

    Draws of a random ranking are averaged within each trial first, so that they are not counted as
    independent trials. Undefined ratios are left out; a mean of none is null, an error of fewer than two too.

    Returns:
        A table with the schema ``CURVES``.
    """
    columns = ["layer", "ranking", "kind", "percentage", "channels"]
    ratios = [f"ratio_{role}" for role in ROLES]
    per_trial = table.group_by([*columns, "target", "off_target"], use_threads=False).aggregate(
        [(ratio, "mean") for ratio in ratios]
    )
    sample = pc.VarianceOptions(ddof=1, min_count=2)
    grouped = per_trial.group_by(columns, use_threads=False).aggregate(
        [
            (f"{ratio}_mean", statistic, options)
            for ratio in ratios
            for statistic, options in (("mean", None), ("stddev", sample), ("count", None))
        ]
    )
    parts = []
    for role in ROLES:
        trials_of = grouped[f"ratio_{role}_mean_count"]
        # A count of 0 goes with a null deviation, so the division by it never shows.
        error = pc.divide(grouped[f"ratio_{role}_mean_stddev"], pc.sqrt(pc.cast(trials_of, pa.float64())))
        values = [grouped[name] for name in columns]
        values += [pa.array([role] * len(grouped)), grouped[f"ratio_{role}_mean_mean"], error, trials_of]
        parts.append(pa.Table.from_arrays(values, names=CURVES.names).cast(CURVES))
    return pa.concat_tables(parts)


def areas(curve_table: pa.Table) -> pa.Table:
    """Area under each pair of curves, and the relative AUC (AUC_target − AUC_off)/AUC_off (METHOD §6).

    Areas are by the trapezoid rule over the percentage as a fraction, from the lowest to the highest
    percentage tried. They are null where a point of the curve is undefined or there is only one point;
    the relative AUC also where AUC_off is 0.

    Returns:
        A table with the schema ``AREAS``.
    """
    points: dict[tuple[str, str, str], dict[str, list[tuple[float, float | None]]]] = {}
    for row in curve_table.to_pylist():
        key = (row["layer"], row["ranking"], row["kind"])
        points.setdefault(key, {role: [] for role in ROLES})[row["role"]].append((row["percentage"], row["ratio"]))
    rows = []
    for (layer, ranking, kind), roles in points.items():
        target, off_target = (_trapezoid(roles[role]) for role in ROLES)
        relative = (target - off_target) / off_target if target is not None and off_target else None
        rows.append(dict(zip(AREAS.names, (layer, ranking, kind, target, off_target, relative), strict=True)))
    return pa.Table.from_pylist(rows, schema=AREAS)


def _trapezoid(points: list[tuple[float, float | None]]) -> float | None:
    values = [value for _, value in sorted(points, key=lambda point: point[0]) if value is not None]
    if len(points) < 2 or len(values) < len(points):
        return None
    fractions = sorted(percentage / 100 for percentage, _ in points)
    return float(np.trapezoid(values, fractions))


def _accuracy(counts: InterventionCounts, cells: slice) -> Float[np.ndarray, "classes"]:
    return _divide(counts.correct[cells], counts.total[cells])


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> Float[np.ndarray, "values"]:
    """The quotient, nan where the denominator is 0 or nan."""
    quotient = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _rows(experiment: Experiment, condition: Condition, percentage: float | int, ratio: np.ndarray) -> pa.Table:
    targets: Int[np.ndarray, "trials"]
    chosen = experiment.off_targets if condition.target is None else [condition.target]
    pairs = [(target, other) for target in chosen for other in experiment.off_targets[target]]
    targets, others = np.asarray(pairs, dtype=np.int32).T
    constants = [
        experiment.layer, condition.ranking, condition.draw, condition.kind, percentage, condition.count
    ]  # fmt: skip
    columns = [pa.repeat(pa.scalar(value, TRIALS.types[i]), len(pairs)) for i, value in enumerate(constants)]
    columns += [pa.array(targets), pa.array(others)]
    columns += [pa.array(ratio[side], from_pandas=True) for side in (targets, others)]
    return pa.Table.from_arrays(columns, schema=TRIALS)
