"""Ablation and preservation curves: one panel per layer, kind of intervention and ranking of channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from codec_dist.report.charts import Axis, Line, Point, line_chart
from codec_dist.report.depth import Table, ranking_name
from codec_dist.report.formatting import number
from codec_dist.report.run_data import Row, RunData, quantity_kind

KIND_NAMES = {"ablate": "Ablate: these channels are set to zero", "preserve": "Preserve: all others are set to zero"}
ORDER = ("contribution", "activation", "random")
HIGHEST_RATIO = 1.2


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


def _panels(layer: str, kind: str, rows: Sequence[Row]) -> list[Panel]:
    rankings = sorted({row["ranking"] for row in rows}, key=_order)
    highest = max((row["ratio"] or 0 for row in rows), default=1)
    panels = []
    for ranking in rankings:
        own = [row for row in rows if row["ranking"] == ranking]
        style = quantity_kind(ranking) if quantity_kind(ranking) in ORDER else "other"
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


def _position(percentage: float) -> float:
    """Small percentages are where curves fall: the square root gives them room."""
    return math.sqrt(percentage)


def _order(ranking: str) -> tuple[int, str]:
    kind = quantity_kind(ranking)
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), ranking)


def _table(rows: Sequence[Row]) -> Table:
    columns = ["ranking", "kind", "% of channels", "channels", "class", "ratio", "standard error", "trials"]
    cells = [
        [
            ranking_name(row["ranking"]),
            row["kind"],
            f"{row['percentage']:g}",
            str(row["channels"]),
            row["role"].replace("_", "-"),
            number(row["ratio"], 3),
            number(row["standard_error"], 3),
            number(row["trials"]),
        ]
        for row in rows
    ]
    return Table(columns, cells)
