"""The laws that the paper finds on ImageNet networks (METHOD: "Reference figures"), tried on this run.

They are findings, not identities: each is said to hold, to hold in part, or not to hold, with the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from codec_dist.report.formatting import interval
from codec_dist.report.run_data import ACTIVATION, CONTRIBUTION, RunData

HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "partly", "does not hold", "not measured"

LEAST_RANK_CORRELATION = 0.5
NEAR_ONE, NEAR_ZERO, LEAST_FALL = 0.7, 0.2, 0.3
LEAST_LAYERS_FOR_DEPTH = 3
# Fewer random draws cannot give a p of .05, however large the effect.
LEAST_DRAWS = 19

Values = Sequence[float | None]


@dataclass(frozen=True)
class Law:
    """One law and what this run says of it."""

    title: str
    verdict: str
    """``holds``, ``partly``, ``does not hold`` or ``not measured``."""
    sentence: str
    """The verdict in words and numbers."""
    layers: Sequence[tuple[str, bool | None, str]] = ()
    """Layer, whether it obeys (None: not known), and its numbers, for laws about each layer."""
    stage: str = "summarize"
    """The stage that measures it."""


def try_laws(data: RunData) -> list[Law]:
    """Every law of METHOD §9, in its order."""
    return [
        _sparser(data),
        _higher_dimensional(data),
        _grow_with_depth(data),
        _signs_decouple(data),
        _more_class_specific(data),
        _more_selective(data),
    ]


def rank_correlation(values: Values) -> float | None:
    """Spearman's correlation of the known values with depth; None where fewer than three or all equal."""
    known = [(depth, value) for depth, value in enumerate(values) if value is not None]
    if len(known) < LEAST_LAYERS_FOR_DEPTH or len({value for _, value in known}) == 1:
        return None
    depths, numbers = zip(*known, strict=True)
    return float(spearmanr(depths, numbers).statistic)


def _sparser(data: RunData) -> Law:
    contributions, activations = _statistic(data, "hoyer_median")
    return _each_layer(
        data,
        "Contributions are sparser than activations at every layer",
        contributions,
        activations,
        lambda ours, theirs: ours > theirs,
        "The median Hoyer sparsity of contributions exceeds that of activations",
        "{:.2f} against {:.2f}",
    )


def _higher_dimensional(data: RunData) -> Law:
    contributions, activations = _statistic(data, "components_95")
    return _each_layer(
        data,
        "Contributions are higher-dimensional than activations at every layer",
        contributions,
        activations,
        lambda ours, theirs: ours > theirs,
        "Class means of contributions need more principal components for 95 % of their variance",
        "{:.0f} against {:.0f}",
        _ceiling(data),
    )


def _ceiling(data: RunData) -> str:
    most = len(data.class_names) - 1
    return f"With {most + 1} classes there are at most {most} components." if most > 0 else ""


def _grow_with_depth(data: RunData) -> Law:
    title = "Sparsity and dimensionality of contributions grow with depth"
    series = {
        "Hoyer sparsity": _statistic(data, "hoyer_median")[0],
        "the number of components": _statistic(data, "components_95")[0],
    }
    found = {name: rank_correlation(values) for name, values in series.items()}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return Law(title, UNKNOWN, _unknown_depth(data))
    grows = [value >= LEAST_RANK_CORRELATION for value in known.values()]
    parts = [
        f"{name} goes from {first:.3g} at the first layer to {last:.3g} at the last (rank correlation with depth "
        f"{_signed(known[name])})"
        for name in known
        for first, last in [_ends(series[name])]
    ]
    return Law(title, _verdict(grows), _sentence("; ".join(parts)))


def _signs_decouple(data: RunData) -> Law:
    title = "E/I correlation falls from near 1 to near 0 with depth"
    values = data.by_layer(data.statistics, "ei_median", quantity=CONTRIBUTION)
    if rank_correlation(values) is None:
        return Law(title, UNKNOWN, _unknown_depth(data))
    first, last = _ends(values)
    tried = {
        "does not fall much": first - last >= LEAST_FALL,
        "does not begin near 1": first >= NEAR_ONE,
        "does not end near 0": abs(last) <= NEAR_ZERO,
    }
    falls, faults = tried["does not fall much"], [fault for fault, passed in tried.items() if not passed]
    verdict = FAILS if not falls else PARTLY if faults else HOLDS
    remark = f" It {' and '.join(faults)}." if faults else ""
    sentence = (
        f"The median correlation of inhibition with excitation across channels goes from {_signed(first)} at the first "
        f"layer to {_signed(last)} at the last.{remark}"
    )
    return Law(title, verdict, sentence)


def _more_class_specific(data: RunData) -> Law:
    contributions, activations = (
        data.by_layer(data.layer_counts, "median_top_correlation", quantity=f"{kind}-positive", unit="mode")
        for kind in (CONTRIBUTION, ACTIVATION)
    )
    return _each_layer(
        data,
        "Contribution modes are more class-specific than activation modes",
        contributions,
        activations,
        lambda ours, theirs: ours > theirs,
        "The median over modes of the highest correlation with a class is larger for contribution modes",
        "{:.2f} against {:.2f}",
    )


def _more_selective(data: RunData) -> Law:
    title = "Ablating contribution modes is more selective than ablating activation modes"
    positive = [f"{kind}-positive" for kind in (CONTRIBUTION, ACTIVATION)]
    ours, theirs = (data.by_layer(data.areas, "relative_auc", ranking=one, kind="ablate") for one in positive)
    own, other = ([data.null(layer, one, "ablate") for layer in data.layers] for one in positive)
    rows: list[tuple[str, bool | None, str]] = []
    untested = False
    for layer, one, another, null in zip(data.layers, ours, theirs, own, strict=True):
        if one is None or another is None:
            rows.append((layer, None, "not measured"))
            continue
        shown = f"{one:+.2f} against {another:+.2f}".replace("-", "−")
        if null is None or null["draws"] < LEAST_DRAWS:
            untested = True
            rows.append((layer, None, f"{shown}; too few random draws to tell from chance"))
            continue
        chance = f"95 % of random channels: {interval(null['low'], null['high'])}"
        rows.append((layer, one < another and one < null["low"], f"{shown}; {chance}"))
    if untested and all(obeys is None for _, obeys, _ in rows):
        few = f"Chance is not known: at least {LEAST_DRAWS} random draws are needed (interventions.random_draws)."
        return Law(title, UNKNOWN, few, rows, "intervene")
    claim = (
        "The relative ablation AUC (more negative: the target class suffers more than others) is lower for "
        "contribution modes, and below the middle 95 % of random channels, at"
    )
    beaten = [_beyond_chance(values, nulls) for values, nulls in ((ours, own), (theirs, other))]
    remark = (
        f"Random channels are beaten by contribution modes at {beaten[0]} and by activation modes at {beaten[1]}. "
        f"The 95 % intervals over classes of the two are apart, in this direction, at {_apart(data, *positive)}."
    )
    return _judge(data, title, rows, claim, remark, "intervene")


def _apart(data: RunData, ours: str, theirs: str) -> str:
    """At how many layers the one ranking's whole interval lies below the other's."""
    pairs = [(data.area(layer, ours, "ablate"), data.area(layer, theirs, "ablate")) for layer in data.layers]
    ends = [(one.get("relative_auc_high"), other.get("relative_auc_low")) for one, other in pairs if one and other]
    known = [high < low for high, low in ends if high is not None and low is not None]
    return f"{sum(known)} of {len(known)} layers"


def _beyond_chance(values: Values, nulls: Sequence[Mapping[str, Any] | None]) -> str:
    """At how many layers values lie below the null's interval."""
    known = [
        value < null["low"]
        for value, null in zip(values, nulls, strict=True)
        if value is not None and null is not None and null["draws"] >= LEAST_DRAWS
    ]
    return f"{sum(known)} of {len(known)} layers"


def _each_layer(
    data: RunData,
    title: str,
    ours: Values,
    theirs: Values,
    obeys: Callable[[float, float], bool],
    claim: str,
    numbers: str,
    remark: str = "",
    stage: str = "summarize",
) -> Law:
    """A law that compares contributions with activations at each layer."""
    rows: list[tuple[str, bool | None, str]] = []
    for layer, one, other in zip(data.layers, ours, theirs, strict=True):
        known = one is not None and other is not None
        shown = numbers.format(one, other).replace("-", "−") if known else "not measured"
        rows.append((layer, obeys(one, other) if known else None, shown))  # type: ignore[arg-type]
    return _judge(data, title, rows, f"{claim} at", remark, stage)


def _judge(
    data: RunData, title: str, rows: Sequence[tuple[str, bool | None, str]], claim: str, remark: str, stage: str
) -> Law:
    """The verdict on a law about each layer; ``claim`` goes before the layers where it is true."""
    tried = [obeyed for _, obeyed, _ in rows if obeyed is not None]
    if not tried:
        return Law(title, UNKNOWN, _unknown_layers(data, stage), stage=stage)
    place = "every layer" if all(tried) else f"{sum(tried)} of {len(tried)} layers" if any(tried) else "no layer"
    examples = [row for row in rows if row[1] is not None]
    last = f"At the last layer it is {examples[-1][2]}."
    return Law(title, _verdict(tried), " ".join(filter(None, [f"{claim} {place}.", last, remark])), rows, stage)


def _verdict(tried: Sequence[bool]) -> str:
    return HOLDS if all(tried) else PARTLY if any(tried) else FAILS


def _statistic(data: RunData, column: str) -> tuple[Values, Values]:
    return (
        data.by_layer(data.statistics, column, quantity=CONTRIBUTION),
        data.by_layer(data.statistics, column, quantity=ACTIVATION),
    )


def _ends(values: Values) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return known[0], known[-1]


def _unknown_depth(data: RunData) -> str:
    if not data.statistics:
        return "Not measured yet."
    return f"Depth needs at least {LEAST_LAYERS_FOR_DEPTH} layers with different values."


def _unknown_layers(data: RunData, stage: str) -> str:
    if stage not in data.made:
        return "Not measured yet."
    if data.unlabelled:
        return "Not defined here: it is about classes, and no image of the evaluate part has a label."
    return "Not defined at any layer for both contributions and activations."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _signed(value: float) -> str:
    return f"{float(np.round(value, 2)) + 0.0:.2f}".replace("-", "−")
