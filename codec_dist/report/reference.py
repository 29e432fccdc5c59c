"""The paper's published figures for ResNet-50, drawn beside a run for comparison."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from codec_dist.report.charts import Axis, Line, Point, line_chart

BLOCKS = 16
STYLES = {
    "contributions": ("contribution", False),
    "activations": ("activation", False),
    "contribution_mode": ("contribution", False),
    "activation_mode": ("activation", False),
    "contribution_chan": ("contribution", True),
    "activation_chan": ("activation", True),
}


@dataclass(frozen=True)
class ReferenceChart:
    """One published figure."""

    figure: str
    what: str
    certain: bool
    """Whether it is certain that the authors' contributions here are integrated gradients with 10 steps."""
    chart: Markup


@dataclass(frozen=True)
class Reference:
    """The published figures, with their source."""

    citation: str
    source: str
    charts: Sequence[ReferenceChart]


def reference() -> Reference:
    """The published figures that the report draws."""
    text = (files("codec_dist.report") / "reference_figures.json").read_text(encoding="utf-8")
    published = json.loads(text)
    charts = [_chart(figure, published["figures"][figure]) for figure in published["figures"]]
    return Reference(published["citation"], published["source"], charts)


def _chart(figure: str, published: Mapping[str, Any]) -> ReferenceChart:
    blocks = published.get("blocks", list(range(BLOCKS)))
    lines = []
    for name, values in published["series"].items():
        style, dashed = STYLES[name]
        lines.append(Line(name, style, _points(blocks, values, published["quartiles"], name), dashed))
    chart = line_chart(
        lines,
        Axis("block of ResNet-50, input → output", [(block, str(block)) for block in range(BLOCKS)]),
        Axis(_axis_label(published["what"]), cover=(0,)),
        label=f"The paper's figure {figure}: {published['what']} by block of ResNet-50",
        size=(360, 220),
        named=False,
        rule=0,
    )
    return ReferenceChart(figure, published["what"], published["attribution"] == "certain", chart)


def _points(blocks: Sequence[int], values: Sequence[Any], quartiles: bool, name: str) -> list[Point]:
    triples = [value if quartiles else (value, None, None) for value in values]
    name = name.replace("_chan", " channels").replace("_mode", " modes")
    return [
        Point(block, median, low, high, f"block {block}, {name}: {median:g}")
        for block, (median, low, high) in zip(blocks, triples, strict=True)
    ]


def _axis_label(what: str) -> str:
    return {
        "components for 95 % of the variance of class means": "components",
        "median over units of the highest correlation with a class": "median top correlation",
    }.get(what, what)
