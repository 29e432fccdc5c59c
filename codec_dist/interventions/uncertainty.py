"""From ratios of subjects to curves, areas and their null: every mean and error is over subjects (docs/method.md §6).

A subject is a target class with its off-target classes. Random rankings play two parts: averaged within each
subject they are one more ranking, and one by one they are the null distribution of every statistic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from codec_dist.interventions.planning import ABLATE, PRESERVE, RANDOM
from codec_dist.utils import derive_seed

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
        ("subjects", pa.int64()),
    ]
)
AREAS = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("kind", pa.string()),
        ("auc_target", pa.float64()),
        ("auc_target_standard_error", pa.float64()),
        ("auc_off_target", pa.float64()),
        ("auc_off_target_standard_error", pa.float64()),
        ("relative_auc", pa.float64()),
        ("relative_auc_low", pa.float64()),
        ("relative_auc_high", pa.float64()),
        ("relative_auc_mean", pa.float64()),
        ("relative_auc_standard_error", pa.float64()),
        ("subjects", pa.int64()),
    ]
)
NULLS = pa.schema(
    [
        ("layer", pa.string()),
        ("ranking", pa.string()),
        ("kind", pa.string()),
        ("statistic", pa.string()),
        ("percentage", pa.float64()),
        ("observed", pa.float64()),
        ("draws", pa.int64()),
        ("mean", pa.float64()),
        ("standard_deviation", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("tail", pa.string()),
        ("p", pa.float64()),
    ]
)
ROLES = ("target", "off_target", "selectivity")
BOOTSTRAP_RESAMPLES = 1000
INTERVAL = (0.025, 0.975)
TAILS = {ABLATE: "lower", PRESERVE: "upper"}
"""Where a statistic lies that speaks for the channels: ablating a class's own channels makes its ratio smaller
than that of others (relative AUC and selectivity below 0), preserving them makes it larger (above 0)."""
# Values this close are equal: what rounding makes of one quotient in two ways.
SAME = 1e-12


@dataclass(frozen=True, eq=False)
class _Ratios:
    """All ratios of one layer, ranking and kind; nan where undefined."""

    layer: str
    ranking: str
    kind: str
    percentages: Float[np.ndarray, "points"]
    channels: Int[np.ndarray, "points"]
    targets: Int[np.ndarray, "subjects"]
    values: Float[np.ndarray, "roles draws subjects points"]

    @property
    def key(self) -> dict[str, Any]:
        return {"layer": self.layer, "ranking": self.ranking, "kind": self.kind}

    def areas(self, values: np.ndarray) -> Float[np.ndarray, "roles ..."]:
        """Areas under target and off-target curves over the fraction of channels; nan for a single point."""
        if len(self.percentages) < 2:
            return np.full(values[:2].shape[:-1], np.nan)
        return np.asarray(np.trapezoid(values[:2], self.percentages / 100, axis=-1))


def curves(subjects: pa.Table) -> pa.Table:
    """Mean ratios over subjects with their standard errors, sd / √subjects, per ranking, kind and percentage.

    Draws of a random ranking are averaged within each subject first. Undefined ratios are left out; a mean of
    none is null, an error of fewer than two too.

    Args:
        subjects: schema ``SUBJECTS``, of any number of layers.

    Returns:
        A table with the schema ``CURVES``.
    """
    rows = []
    for ratios in _split(subjects):
        of_subjects = _mean(ratios.values, axis=1)
        for role, values in zip(ROLES, of_subjects, strict=True):
            for percentage, channels, column in zip(ratios.percentages, ratios.channels, values.T, strict=True):
                mean, error, count = _mean_and_error(column)
                point = {"percentage": percentage, "channels": int(channels), "role": role}
                rows.append({**ratios.key, **point, "ratio": mean, "standard_error": error, "subjects": count})
    return pa.Table.from_pylist(rows, schema=CURVES)


def areas(subjects: pa.Table, seed: int) -> pa.Table:
    """Areas under the curves, and the relative AUC (AUC_target − AUC_off)/AUC_off with its uncertainty.

    Areas are by the trapezoid rule over the percentage as a fraction, from the lowest to the highest
    percentage tried; null for a single percentage. ``relative_auc`` is of the mean curves (the paper's), with
    the 95 % percentile interval of 1,000 bootstrap resamples of the subjects; ``relative_auc_mean`` is the mean
    over the subjects' own relative AUCs, with its standard error. A relative AUC is null where AUC_off is 0.

    Args:
        subjects: schema ``SUBJECTS``, of any number of layers.
        seed: seed of the bootstrap.

    Returns:
        A table with the schema ``AREAS``; its column ``subjects`` counts those with a relative AUC of their own.
    """
    rows = []
    for ratios in _split(subjects):
        of_subjects = ratios.areas(_mean(ratios.values, axis=1))
        target, off_target = map(_mean_and_error, of_subjects)
        low, high = _bootstrap(of_subjects, derive_seed(seed, "bootstrap", ratios.layer, ratios.ranking, ratios.kind))
        mean, error, count = _mean_and_error(_relative(of_subjects))
        values = (*target[:2], *off_target[:2], _known(_of_means(of_subjects)), low, high, mean, error, count)
        rows.append({**ratios.key, **dict(zip(AREAS.names[3:], values, strict=True))})
    return pa.Table.from_pylist(rows, schema=AREAS)


def nulls(subjects: pa.Table) -> pa.Table:
    """Each statistic of each ranking beside what random rankings of the same subjects give, draw by draw.

    Statistics are ``relative_auc``, ``relative_auc_mean`` (as in :func:`areas`) and, at each percentage,
    ``selectivity`` (mean over subjects). ``mean``, ``standard_deviation``, and ``low`` and ``high`` (percentiles
    2.5 and 97.5) are over draws. The one-sided p = (1 + draws at least as extreme) / (draws + 1): as extreme are
    values ≤ the observed one where the tail is ``lower`` (ablate), ≥ where it is ``upper`` (preserve).

    Args:
        subjects: schema ``SUBJECTS``, of any number of layers.

    Returns:
        A table with the schema ``NULLS``; empty without random rankings. Draws whose statistic is undefined
        are not counted.
    """
    found = list(_split(subjects))
    random = {(ratios.layer, ratios.kind): ratios for ratios in found if ratios.ranking == RANDOM}
    rows: list[dict[str, Any]] = []
    for ratios in found:
        control = random.get((ratios.layer, ratios.kind))
        if ratios.ranking == RANDOM or control is None:
            continue
        same = control.values[:, :, np.isin(control.targets, ratios.targets)]
        observed, chance = _statistics(ratios, ratios.values), _statistics(ratios, same)
        for (name, percentage), drawn in chance.items():
            row = _compare(float(observed[name, percentage][0]), drawn, TAILS[ratios.kind])
            rows.append({**ratios.key, "statistic": name, "percentage": percentage, **row})
    return pa.Table.from_pylist(rows, schema=NULLS)


def _statistics(
    ratios: _Ratios, values: Float[np.ndarray, "roles draws subjects points"]
) -> dict[tuple[str, float | None], Float[np.ndarray, "draws"]]:
    of_subjects = ratios.areas(values)
    selectivity = _mean(values[ROLES.index("selectivity")], axis=1)
    return {
        ("relative_auc", None): _of_means(of_subjects),
        ("relative_auc_mean", None): _mean(_relative(of_subjects), axis=-1),
        **{
            ("selectivity", float(percentage)): selectivity[:, point]
            for point, percentage in enumerate(ratios.percentages)
        },
    }


def _compare(observed: float, drawn: Float[np.ndarray, "draws"], tail: str) -> dict[str, Any]:
    drawn = drawn[np.isfinite(drawn)]
    row = {"observed": _known(observed), "draws": len(drawn), "tail": tail, "mean": _known(_mean(drawn, axis=0))}
    row["standard_deviation"] = float(drawn.std(ddof=1)) if len(drawn) > 1 else None
    row["low"], row["high"] = np.quantile(drawn, INTERVAL).tolist() if len(drawn) else (None, None)
    excess = (drawn - observed) * (1 if tail == "upper" else -1)
    extreme = int((excess >= -SAME * max(1.0, abs(observed))).sum()) if np.isfinite(observed) else 0
    row["p"] = (1 + extreme) / (len(drawn) + 1) if np.isfinite(observed) and len(drawn) else None
    return row


def _bootstrap(of_subjects: Float[np.ndarray, "roles subjects"], seed: int) -> tuple[float | None, float | None]:
    """The interval of the relative AUC of means over resamples of the subjects; null for fewer than two."""
    of_subjects = of_subjects[:, np.isfinite(of_subjects).any(axis=0)]
    count = of_subjects.shape[1]
    if count < 2:
        return None, None
    selected = np.random.default_rng(seed).integers(0, count, (BOOTSTRAP_RESAMPLES, count))
    found = _of_means(of_subjects[:, selected])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, INTERVAL).tolist() if len(found) else (None, None)
    return low, high


def _of_means(of_subjects: Float[np.ndarray, "roles ... subjects"]) -> Float[np.ndarray, "..."]:
    """The relative AUC of the mean curves."""
    return _relative(_mean(of_subjects, axis=-1))


def _relative(both: Float[np.ndarray, "roles ..."]) -> Float[np.ndarray, "..."]:
    target, off_target = both
    relative = np.full(np.shape(off_target), np.nan)
    np.divide(target - off_target, off_target, out=relative, where=off_target > 0)
    return relative


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean of the defined values; nan where there is none."""
    defined = np.isfinite(values)
    count = defined.sum(axis=axis)
    mean = np.full(count.shape, np.nan)
    np.divide(np.where(defined, values, 0).sum(axis=axis), count, out=mean, where=count > 0)
    return mean


def _mean_and_error(values: Float[np.ndarray, "subjects"]) -> tuple[float | None, float | None, int]:
    values = values[np.isfinite(values)]
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return _known(_mean(values, axis=0)), error, len(values)


def _known(value: np.ndarray | float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _split(subjects: pa.Table) -> Iterator[_Ratios]:
    """The ratios of each layer, ranking and kind as arrays, in the order in which they first appear."""
    keys = ("layer", "ranking", "kind")
    codes = np.stack([subjects[key].combine_chunks().dictionary_encode().indices.to_numpy() for key in keys], axis=1)
    different, first, group = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    for number in np.argsort(first) if len(different) else ():
        key = {name: subjects[name][int(first[number])].as_py() for name in keys}
        rows = subjects.filter(pa.array(group.reshape(-1) == number))
        percentages, point = np.unique(rows["percentage"].to_numpy(), return_inverse=True)
        targets, subject = np.unique(rows["target"].to_numpy(), return_inverse=True)
        draws, draw = np.unique(rows["draw"].to_numpy(), return_inverse=True)
        channels = np.empty(len(percentages), np.int64)
        channels[point] = rows["channels"].to_numpy()
        values = np.full((len(ROLES), len(draws), len(targets), len(percentages)), np.nan)
        for role, name in enumerate(("ratio_target", "ratio_off_target", "selectivity")):
            values[role, draw, subject, point] = rows[name].to_numpy()
        yield _Ratios(**key, percentages=percentages, channels=channels, targets=targets, values=values)
