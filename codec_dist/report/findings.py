"""A run's main numbers, and the findings of the paper tried on this run (docs/method.md §9).

What the paper finds on ImageNet networks is no identity: each finding is said to hold, to hold in part, or not to
hold, with the numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from codec_dist.report.formatting import interval, number, percent
from codec_dist.report.run_data import ACTIVATION, CONTRIBUTION, RESULTS, Row, RunData, read_run

POSITIVE = f"{CONTRIBUTION}-positive"

HOLDS, PARTLY, FAILS, UNKNOWN = "holds", "partly", "does not hold", "not measured"

LEAST_RANK_CORRELATION = 0.5
NEAR_ONE, NEAR_ZERO, LEAST_FALL = 0.7, 0.2, 0.3
LEAST_LAYERS_FOR_DEPTH = 3
# Fewer random draws cannot give a p of .05, however large the effect.
LEAST_DRAWS = 19

Values = Sequence[float | None]


@dataclass(frozen=True)
class Headline:
    """One number that a reader sees first."""

    value: str
    label: str
    remark: str = ""


@dataclass(frozen=True)
class PaperFinding:
    """One finding and what this run says of it."""

    title: str
    verdict: str
    """``holds``, ``partly``, ``does not hold`` or ``not measured``."""
    sentence: str
    """The verdict in words and numbers."""
    layers: Sequence[tuple[str, bool | None, str]] = ()
    """Layer, whether it obeys (None: not known), and its numbers, for paper_findings about each layer."""
    stage: str = "summarize"
    """The stage that measures it."""


@dataclass(frozen=True)
class Findings:
    """What a run found; ``str`` is a table for a terminal."""

    headlines: Sequence[Headline]
    paper_findings: Sequence[PaperFinding]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """One row per layer."""
    left_out: Sequence[str] = ()
    """Stages whose results belong to other settings or an earlier version and are left out."""

    def __str__(self) -> str:
        table = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        headlines = [f"{one.label}: {one.value}" + (f" ({one.remark})" if one.remark else "") for one in self.headlines]
        paper_findings = [f"{finding.verdict + ':':<15}{finding.title}" for finding in self.paper_findings]
        remarks = (
            ["", f"left out, of other settings or an earlier version: {', '.join(self.left_out)}"]
            if self.left_out
            else []
        )
        return "\n".join([*headlines, "", *lines, "", *paper_findings, *remarks])


def findings(run_directory: Path, current: Collection[str] | None = None) -> Findings:
    """The main numbers of a run, as far as its stages have gone.

    Args:
        run_directory: the run's folder.
        current: stages whose results belong together; those of others are left out. None: all that is there.

    Raises:
        ReportError: no such run, or a file that cannot be read.
    """
    return find(read_run(Path(run_directory), current=current))


def find(data: RunData) -> Findings:
    """The main numbers of a run that was read already."""
    counts = {"quantity": POSITIVE, "unit": "mode"}
    columns = {
        "Hoyer, contributions": data.by_layer(data.statistics, "hoyer_median", quantity=CONTRIBUTION),
        "activations": data.by_layer(data.statistics, "hoyer_median", quantity=ACTIVATION),
        "E/I": data.by_layer(data.statistics, "ei_median", quantity=CONTRIBUTION),
        "EV of SAE": explained_variance(data, POSITIVE),
        "alive modes": data.by_layer(data.layer_counts, "alive", **counts),
        "relative AUC": data.by_layer(data.areas, "relative_auc", ranking=POSITIVE, kind="ablate"),
    }
    rows = []
    for place, layer in enumerate(data.layers):
        null = data.null(layer, POSITIVE, "ablate") or {}
        chance = [interval(null.get("low"), null.get("high")), number(null.get("p"), 3)]
        rows.append([layer, *(number(values[place]) for values in columns.values()), *chance])
    left_out = [stage for stage in RESULTS if stage in data.left_out]
    return Findings(
        headlines(data), check_paper_findings(data), ["layer", *columns, "random: 95 %", "p"], rows, left_out
    )


def explained_variance(data: RunData, quantity: str) -> list[float | None]:
    """EV on *evaluate* of each layer's selected SAE."""
    saes = [data.selected_sae(layer, quantity) for layer in data.layers]
    return [sae.evaluate.get("ev") if sae else None for sae in saes]


def headlines(data: RunData) -> list[Headline]:
    """The numbers that are known, most general first."""
    found: list[Headline] = []
    if data.store is not None:
        parts = ", ".join(f"{count:,} {name}" for name, count in data.store.parts.items())
        found.append(Headline(f"{data.store.images:,}", "images", parts))
        channels = sum(data.store.layers.values())
        found.append(Headline(str(len(data.store.layers)), "layers", f"{channels:,} channels"))
        if data.store.accuracy is not None:
            found.append(Headline(percent(data.store.accuracy), "model accuracy", "on the evaluate part"))
        if data.store.residuals:
            worst = max(data.store.residuals, key=lambda residual: residual.median)
            remark = f"median relative residual at the worst layer ({worst.layer})"
            found.append(Headline(percent(worst.median), "missing from the sum of contributions", remark))
    explained = sorted(value for value in explained_variance(data, POSITIVE) if value is not None)
    if explained:
        spread = f"{number(explained[0])} to {number(explained[-1])} over layers"
        found.append(Headline(number(_median(explained)), "median EV of contribution SAEs", spread))
    counts = [row for row in data.layer_counts if (row["quantity"], row["unit"]) == (POSITIVE, "mode")]
    if counts:
        alive, modes = sum(row["alive"] for row in counts), sum(row["modes"] for row in counts)
        correlated = sum(row["modes_above_threshold"] for row in counts)
        remark = f"of {modes:,}; {correlated:,} class-correlated"
        found.append(Headline(f"{alive:,}", "alive contribution modes", remark))
    found += _best_ablation(data)
    return found


def _best_ablation(data: RunData) -> list[Headline]:
    """The lowest relative AUC, with its interval and with what random channels give at the same layer."""
    areas = [row for row in data.areas if (row["ranking"], row["kind"]) == (POSITIVE, "ablate")]
    known = [row for row in areas if row["relative_auc"] is not None]
    if not known:
        return []
    best: Row = min(known, key=lambda row: float(row["relative_auc"]))
    parts = [f"at {best['layer']}" + (f", lowest of {len(known)} layers" if len(known) > 1 else "")]
    if best["relative_auc_low"] is not None:
        parts.append(f"95 %: {interval(best['relative_auc_low'], best['relative_auc_high'])}")
    null = data.null(best["layer"], POSITIVE, "ablate")
    if null is not None:
        parts.append(f"random channels: {interval(null['low'], null['high'])}, p = {number(null['p'], 3)}")
    return [Headline(number(best["relative_auc"]), "best relative ablation AUC", "; ".join(parts))]


def _median(values: Sequence[float]) -> float:
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


# ---- The findings of the paper, tried on this run


def check_paper_findings(data: RunData) -> list[PaperFinding]:
    """Every finding of docs/method.md §9, in its order."""
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


def _sparser(data: RunData) -> PaperFinding:
    contributions, activations = _statistic(data, "hoyer_median")
    return _each_layer(
        data,
        "Contributions are sparser than activations at every layer",
        contributions,
        activations,
        "The median Hoyer sparsity of contributions exceeds that of activations",
        "{:.2f} against {:.2f}",
    )


def _higher_dimensional(data: RunData) -> PaperFinding:
    contributions, activations = _statistic(data, "components_95")
    return _each_layer(
        data,
        "Contributions are higher-dimensional than activations at every layer",
        contributions,
        activations,
        "Class means of contributions need more principal components for 95 % of their variance",
        "{:.0f} against {:.0f}",
        _ceiling(data),
    )


def _ceiling(data: RunData) -> str:
    most = len(data.class_names) - 1
    return f"With {most + 1} classes there are at most {most} components." if most > 0 else ""


def _grow_with_depth(data: RunData) -> PaperFinding:
    title = "Sparsity and dimensionality of contributions grow with depth"
    series = {
        "Hoyer sparsity": _statistic(data, "hoyer_median")[0],
        "the number of components": _statistic(data, "components_95")[0],
    }
    found = {name: rank_correlation(values) for name, values in series.items()}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return PaperFinding(title, UNKNOWN, _unknown_depth(data))
    grows = [value >= LEAST_RANK_CORRELATION for value in known.values()]
    parts = [
        f"{name} goes from {first:.3g} at the first layer to {last:.3g} at the last (rank correlation with depth "
        f"{_signed(known[name])})"
        for name in known
        for first, last in [_ends(series[name])]
    ]
    return PaperFinding(title, _verdict(grows), _sentence("; ".join(parts)))


def _signs_decouple(data: RunData) -> PaperFinding:
    title = "E/I correlation falls from near 1 to near 0 with depth"
    values = data.by_layer(data.statistics, "ei_median", quantity=CONTRIBUTION)
    if rank_correlation(values) is None:
        return PaperFinding(title, UNKNOWN, _unknown_depth(data))
    first, last = _ends(values)
    tried = {
        "does not fall much": first - last >= LEAST_FALL,
        "does not begin near 1": first >= NEAR_ONE,
        "does not end near 0": abs(last) <= NEAR_ZERO,
    }
    falls, missed = tried["does not fall much"], [name for name, passed in tried.items() if not passed]
    verdict = FAILS if not falls else PARTLY if missed else HOLDS
    remark = f" It {' and '.join(missed)}." if missed else ""
    sentence = (
        f"The median correlation of inhibition with excitation across channels goes from {_signed(first)} at the first "
        f"layer to {_signed(last)} at the last.{remark}"
    )
    return PaperFinding(title, verdict, sentence)


def _more_class_specific(data: RunData) -> PaperFinding:
    contributions, activations = (
        data.by_layer(data.layer_counts, "median_top_correlation", quantity=f"{kind}-positive", unit="mode")
        for kind in (CONTRIBUTION, ACTIVATION)
    )
    return _each_layer(
        data,
        "Contribution modes are more class-specific than activation modes",
        contributions,
        activations,
        "The median over modes of the highest correlation with a class is larger for contribution modes",
        "{:.2f} against {:.2f}",
    )


def _more_selective(data: RunData) -> PaperFinding:
    title = "Ablating contribution modes is more selective than ablating activation modes"
    positive = [f"{kind}-positive" for kind in (CONTRIBUTION, ACTIVATION)]
    contributions, activations = (
        data.by_layer(data.areas, "relative_auc", ranking=ranking, kind="ablate") for ranking in positive
    )
    nulls, activation_nulls = ([data.null(layer, ranking, "ablate") for layer in data.layers] for ranking in positive)
    rows: list[tuple[str, bool | None, str]] = []
    untested = False
    for layer, contribution, activation, null in zip(data.layers, contributions, activations, nulls, strict=True):
        if contribution is None or activation is None:
            rows.append((layer, None, "not measured"))
            continue
        shown = f"{contribution:+.2f} against {activation:+.2f}".replace("-", "−")
        if null is None or null["draws"] < LEAST_DRAWS:
            untested = True
            rows.append((layer, None, f"{shown}; too few random draws to tell from chance"))
            continue
        chance = f"95 % of random channels: {interval(null['low'], null['high'])}"
        rows.append((layer, contribution < activation and contribution < null["low"], f"{shown}; {chance}"))
    if untested and all(obeys is None for _, obeys, _ in rows):
        few = f"Chance is not known: at least {LEAST_DRAWS} random draws are needed (interventions.random_draws)."
        return PaperFinding(title, UNKNOWN, few, rows, "intervene")
    claim = (
        "The relative ablation AUC (more negative: the target class suffers more than others) is lower for "
        "contribution modes, and below the middle 95 % of random channels, at"
    )
    beaten = [
        _beyond_chance(values, random) for values, random in ((contributions, nulls), (activations, activation_nulls))
    ]
    remark = (
        f"Random channels are beaten by contribution modes at {beaten[0]} and by activation modes at {beaten[1]}. "
        f"The 95 % intervals over classes of the two are apart, in this direction, at {_apart(data, *positive)}."
    )
    return _judge(data, title, rows, claim, remark, "intervene")


def _apart(data: RunData, lower: str, upper: str) -> str:
    """At how many layers the whole interval of the ranking ``lower`` lies below that of ``upper``."""
    pairs = [(data.area(layer, lower, "ablate"), data.area(layer, upper, "ablate")) for layer in data.layers]
    ends = [(low.get("relative_auc_high"), high.get("relative_auc_low")) for low, high in pairs if low and high]
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
    contributions: Values,
    activations: Values,
    claim: str,
    numbers: str,
    remark: str = "",
    stage: str = "summarize",
) -> PaperFinding:
    """A finding that holds at a layer where the value of contributions exceeds that of activations."""
    rows: list[tuple[str, bool | None, str]] = []
    for layer, contribution, activation in zip(data.layers, contributions, activations, strict=True):
        if contribution is None or activation is None:
            rows.append((layer, None, "not measured"))
        else:
            shown = numbers.format(contribution, activation).replace("-", "−")
            rows.append((layer, contribution > activation, shown))
    return _judge(data, title, rows, f"{claim} at", remark, stage)


def _judge(
    data: RunData, title: str, rows: Sequence[tuple[str, bool | None, str]], claim: str, remark: str, stage: str
) -> PaperFinding:
    """The verdict on a finding about each layer; ``claim`` goes before the layers where it is true."""
    tried = [obeyed for _, obeyed, _ in rows if obeyed is not None]
    if not tried:
        return PaperFinding(title, UNKNOWN, _unknown_layers(data, stage), stage=stage)
    place = "every layer" if all(tried) else f"{sum(tried)} of {len(tried)} layers" if any(tried) else "no layer"
    examples = [row for row in rows if row[1] is not None]
    last = f"At the last layer it is {examples[-1][2]}."
    return PaperFinding(
        title, _verdict(tried), " ".join(filter(None, [f"{claim} {place}.", last, remark])), rows, stage
    )


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
