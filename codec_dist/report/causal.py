"""Causal tests: relative AUC by layer beside what random channels give, and the curves behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from codec_dist.report.charts import Axis, Dot, Line, Point, dot_chart, line_chart
from codec_dist.report.depth import Figure, Table, ranking_name
from codec_dist.report.formatting import interval, number
from codec_dist.report.run_data import RANDOM, Row, RunData, quantity_kind

KIND_NAMES = {"ablate": "Ablate: these channels are set to zero", "preserve": "Preserve: all others are set to zero"}
ORDER = ("contribution", "activation", "random")
HIGHEST_RATIO = 1.2
TITLES = {"ablate": "Selectivity of ablation", "preserve": "Selectivity of preservation"}
CAPTIONS = {
    "ablate": "Relative AUC of ablation. Below 0, the target class suffers more than its off-target classes.",
    "preserve": "Relative AUC of preservation. Above 0, the target class is kept better than its off-target classes.",
}
BETTER = {"ablate": "lower is more selective", "preserve": "higher is more selective"}


@dataclass(frozen=True)
class Panel:
    """Target and off-target curves of one ranking."""

    name: str
    style: str
    chart: Markup


@dataclass(frozen=True)
class KindOfIntervention:
    """Panels that share an axis."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class LayerCurves:
    """A tab of the causal tests."""

    layer: str
    kinds: Sequence[KindOfIntervention]
    table: Table


def layer_curves(data: RunData) -> list[LayerCurves]:
    """The curves of every layer that was intervened on."""
    found = []
    for layer in data.layers:
        rows = [row for row in data.curves if row["layer"] == layer]
        if rows:
            kinds = [
                KindOfIntervention(title, _panels(layer, kind, [row for row in rows if row["kind"] == kind]))
                for kind, title in KIND_NAMES.items()
            ]
            found.append(LayerCurves(layer, [kind for kind in kinds if kind.panels], _table(rows)))
    return found


def selectivity_figures(data: RunData) -> list[Figure]:
    """Relative AUC by layer and ranking, of ablation and of preservation, each beside its null."""
    tested = {row["kind"] for row in data.areas if row["ranking"] != RANDOM}
    return [_selectivity(data, kind) for kind in TITLES if kind in tested]


def _selectivity(data: RunData, kind: str) -> Figure:
    rankings = sorted({row["ranking"] for row in data.areas if row["kind"] == kind} - {RANDOM}, key=_order)
    dots, rows = [], []
    for layer in data.layers:
        tested = [name for name in rankings if data.area(layer, name, kind) is not None]
        if tested:
            dots.append((layer, [_dot(data, layer, ranking, kind) for ranking in tested]))
            rows += [_selectivity_row(data, layer, ranking, kind) for ranking in tested]
    draws = max((row["draws"] for row in data.nulls if row["kind"] == kind), default=0)
    classes = sorted({row["subjects"] for row in data.areas if row["kind"] == kind})
    shown = f"{classes[0]}" if len(classes) == 1 else f"{classes[0]} to {classes[-1]}"
    caption = (
        f"{CAPTIONS[kind]} Whiskers: 95 % bootstrap interval over {shown} target classes. "
        + f"Grey bars: the middle 95 % of {draws} random rankings of the same classes, with their mean." * bool(draws)
    )
    axis = Axis(f"relative AUC ({BETTER[kind]})", cover=(0,))
    chart = dot_chart(dots, axis, label=f"{TITLES[kind]} by layer and ranking of channels. {caption}")
    columns = [
        "layer", "ranking", "relative AUC", "95 % interval", "mean over classes", "standard error", "classes",
        "random: mean", "random: 95 %", "draws", "p",
    ]  # fmt: skip
    return Figure(TITLES[kind], caption, chart, Table(columns, rows))


def _dot(data: RunData, layer: str, ranking: str, kind: str) -> Dot:
    area, null = data.area(layer, ranking, kind) or {}, data.null(layer, ranking, kind)
    value, low, high = (area.get(name) for name in ("relative_auc", "relative_auc_low", "relative_auc_high"))
    note = f"{layer}, {ranking_name(ranking)}: {number(value, 3)} ({interval(low, high, 3)})"
    if null is None:
        return Dot(_style(ranking), value, note, low, high)
    chance = f"random channels: {number(null['mean'], 3)} ({interval(null['low'], null['high'], 3)})"
    return Dot(
        _style(ranking), value, f"{note}; {chance}, p = {number(null['p'], 3)}", low, high,
        (null["low"], null["mean"], null["high"]), f"{layer}, {chance}",
    )  # fmt: skip


def _selectivity_row(data: RunData, layer: str, ranking: str, kind: str) -> list[str]:
    area, null = data.area(layer, ranking, kind) or {}, data.null(layer, ranking, kind) or {}
    return [
        layer,
        ranking_name(ranking),
        number(area.get("relative_auc"), 3),
        interval(area.get("relative_auc_low"), area.get("relative_auc_high"), 3),
        number(area.get("relative_auc_mean"), 3),
        number(area.get("relative_auc_standard_error"), 3),
        number(area.get("subjects")),
        number(null.get("mean"), 3),
        interval(null.get("low"), null.get("high"), 3),
        number(null.get("draws")),
        number(null.get("p"), 3),
    ]


def _panels(layer: str, kind: str, rows: Sequence[Row]) -> list[Panel]:
    rankings = sorted({row["ranking"] for row in rows}, key=_order)
    highest = max((row["ratio"] or 0 for row in rows if row["role"] in ("target", "off_target")), default=1)
    panels = []
    for ranking in rankings:
        own = [row for row in rows if row["ranking"] == ranking]
        style = _style(ranking)
        lines = [
            _line("target", style, [row for row in own if row["role"] == "target"]),
            _line("off-target", style, [row for row in own if row["role"] == "off_target"], dashed=True),
        ]
        ticks = [(_position(row["percentage"]), f"{row['percentage']:g}") for row in own if row["role"] == "target"]
        chart = line_chart(
            lines,
            Axis("% of channels", sorted(ticks)),
            Axis("accuracy after / before", cover=(0, min(highest, HIGHEST_RATIO))),
            label=f"{kind} at {layer} by {ranking_name(ranking)}: accuracy ratio of target and off-target classes",
            size=(300, 210),
            named=False,
            rule=1,
        )
        panels.append(Panel(ranking_name(ranking), style, chart))
    return panels


def _line(name: str, style: str, rows: Sequence[Row], dashed: bool = False) -> Line:
    points = []
    for row in sorted(rows, key=lambda row: float(row["percentage"])):
        ratio, error = row["ratio"], row["standard_error"]
        note = f"{name}, {row['percentage']:g} % ({row['channels']} channels): {number(ratio, 3)} ± {number(error, 3)}"
        low = None if ratio is None or error is None else ratio - error
        high = None if ratio is None or error is None else ratio + error
        points.append(Point(_position(row["percentage"]), ratio, low, high, note))
    return Line(name, style, points, dashed)


def _style(ranking: str) -> str:
    kind = quantity_kind(ranking)
    return kind if kind in ORDER else "other"


def _position(percentage: float) -> float:
    """Small percentages are where curves fall: the square root gives them room."""
    return math.sqrt(percentage)


def _order(ranking: str) -> tuple[int, str]:
    kind = quantity_kind(ranking)
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), ranking)


def _table(rows: Sequence[Row]) -> Table:
    columns = ["ranking", "kind", "% of channels", "channels", "of", "ratio", "standard error", "classes"]
    cells = [
        [
            ranking_name(row["ranking"]),
            row["kind"],
            f"{row['percentage']:g}",
            str(row["channels"]),
            row["role"].replace("_", "-"),
            number(row["ratio"], 3),
            number(row["standard_error"], 3),
            number(row["subjects"]),
        ]
        for row in rows
    ]
    return Table(columns, cells)
