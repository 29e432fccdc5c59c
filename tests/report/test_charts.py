"""Charts put marks where the numbers say, and hold only text where text belongs."""

import itertools
import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.report.charts import (
    Axis,
    Bar,
    Dot,
    Line,
    Point,
    bar_chart,
    dot_chart,
    layer_axis,
    line_chart,
    nice_ticks,
    spread,
)
from codec_dist.report.formatting import duration, number, percent, size

finite = st.floats(-1e6, 1e6, allow_nan=False)


def marks(chart: str, kind: str) -> list[tuple[float, float]]:
    root = ET.fromstring(chart)
    return [
        (float(one.get("cx", "nan")), float(one.get("cy", "nan")))
        for one in root.iter("circle")
        if kind in (one.get("class") or "").split()
    ]


def line(*values: float | None) -> Line:
    return Line("contributions", "contribution", [Point(place, value) for place, value in enumerate(values)])


def test_points_lie_in_proportion_to_their_values() -> None:
    chart = line_chart([line(0, 1, 3)], layer_axis(["a.0", "a.1", "a.2"]), Axis("y"), label="x")
    (x0, y0), (x1, y1), (x2, y2) = marks(chart, "contribution")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert (y0 - y2) == pytest.approx(3 * (y0 - y1), abs=0.05)
    assert y2 < y1 < y0  # larger is higher


def test_an_undefined_value_breaks_the_line() -> None:
    chart = line_chart([line(1, 2, None, 4, 5)], layer_axis(list("abcde")), Axis("y"), label="x")
    paths = [one for one in ET.fromstring(chart).iter("path") if (one.get("class") or "").startswith("line")]
    assert len(paths) == 2
    assert len(marks(chart, "contribution")) == 4


@pytest.mark.parametrize("values", [(), (None,), (0.5,), (0.5, 0.5), (float(10**6), -1e-9)])
def test_charts_of_few_or_equal_values_are_drawn(values: tuple[float | None, ...]) -> None:
    layers = [f"l.{place}" for place in range(len(values))]
    chart = line_chart([line(*values)], layer_axis(layers), Axis("y"), label="x")
    assert "nan" not in chart
    assert "inf" not in chart
    for x, y in marks(chart, "contribution"):
        assert 0 <= x <= 560
        assert 0 <= y <= 300


def test_markup_in_names_is_escaped_in_charts() -> None:
    bad = "<script>alert(1)</script>"
    charts = [
        line_chart([Line(bad, "contribution", [Point(0, 1, note=bad)])], layer_axis([bad]), Axis(bad), label=bad),
        bar_chart([(bad, [Bar("contribution", [1], bad)])], Axis(bad), label=bad),
        dot_chart([(bad, [Dot("random", 1, bad)])], Axis(bad), label=bad),
    ]
    for chart in charts:
        assert "<script" not in chart
        assert "&lt;script&gt;" in chart
        ET.fromstring(chart)


def test_nested_bars_are_as_long_as_their_amounts() -> None:
    chart = bar_chart([("l", [Bar("contribution", [32, 16, 8], "n")])], Axis("modes"), label="x")
    widths = [float(one.get("width", "nan")) for one in ET.fromstring(chart).iter("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)
    assert widths[0] == pytest.approx(4 * widths[2], abs=0.04)


def test_marks_of_kinds_differ_in_shape_and_not_in_colour_alone() -> None:
    dots = [Dot("contribution", 0.0, ""), Dot("activation", 0.0, ""), Dot("random", 0.0, "")]
    root = ET.fromstring(dot_chart([("l", dots)], Axis("x"), label="x"))
    shapes = [one.get("d") or "circle" for one in root.iter() if (one.get("class") or "").startswith("mark")]
    assert len(set(shapes)) == 3


def test_layer_names_lose_what_all_begin_with() -> None:
    axis = layer_axis(["blocks.0.mlp", "blocks.1.mlp"])
    assert [text for _, text in axis.ticks] == ["0.mlp", "1.mlp"]
    assert "blocks." in axis.label
    assert [text for _, text in layer_axis(["layer1.0", "layer1.1", "fc"]).ticks] == ["layer1.0", "layer1.1", "fc"]


def test_labels_of_many_layers_do_not_touch() -> None:
    layers = [f"layer{stage}.{block}" for stage in range(4) for block in range(12)]
    chart = line_chart([line(*range(48))], layer_axis(layers), Axis("y"), label="x")
    ticks = [
        (float(one.get("x", "nan")), one.text or "")
        for one in ET.fromstring(chart).iter("text")
        if one.get("class") == "tick" and one.get("text-anchor") == "middle"
    ]
    assert len(ticks) > 3
    for (left, one), (right, other) in itertools.pairwise(ticks):
        assert right - left > 3 * (len(one) + len(other))


@given(finite, finite)
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    low, high = sorted((low, high))
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 12
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5, 10)


@given(st.lists(st.floats(0, 100), max_size=6))
def test_names_are_moved_apart_and_keep_their_order(places: list[float]) -> None:
    moved = spread(places, 15, 0, 100)
    order = sorted(range(len(places)), key=places.__getitem__)
    for one, other in itertools.pairwise(order):
        assert moved[other] - moved[one] >= 15 - 1e-6
    assert all(place <= 100 + 1e-6 for place in moved)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8512, "0.85"), (-0.4, "−0.40"), (None, "–"), (float("nan"), "–"), (1797, "1,797"), (0.00012, "1.2e−04"),
     (0.0, "0.00"), (-0.0, "0.00"), (12345.678, "12,345.68"), (-5, "−5")],
)  # fmt: skip
def test_numbers_read_well(value: float | int | None, text: str) -> None:
    assert number(value) == text


def test_units_read_well() -> None:
    assert percent(0.994) == "99.4 %"
    assert percent(None) == "–"
    assert [size(one) for one in (12, 12_900_000, 3 * 10**12)] == ["12 B", "12.9 MB", "3.0 TB"]
    assert [duration(one) for one in (1.5, 79, 7300)] == ["1.5 s", "1 min 19 s", "2 h 1 min"]
    assert not re.search("-", number(-1e-9))


def test_an_interval_and_a_null_lie_in_proportion_to_their_ends() -> None:
    dots = [
        Dot("contribution", -0.5, "c", -0.7, -0.2, (-0.1, 0.0, 0.3)),
        Dot("activation", -0.4, "a", -0.4, -0.4, (-0.1, 0.0, 0.3)),
    ]
    root = ET.fromstring(dot_chart([("l", dots)], Axis("x"), label="x"))
    (mark,) = (one for one in root.iter("circle"))
    first, second = (one for one in root.iter("line") if (one.get("class") or "").startswith("interval"))
    bars = [one for one in root.iter("rect") if "bar" in (one.get("class") or "")]
    x1, x2, at = (float(one) for one in (first.get("x1", ""), first.get("x2", ""), mark.get("cx", "")))
    unit = (x2 - x1) / 0.5
    assert at - x1 == pytest.approx(0.2 * unit, abs=0.05)
    assert float(bars[0].get("width", "")) == pytest.approx(0.4 * unit, abs=0.05)
    assert float(bars[0].get("x", "")) - x1 == pytest.approx(0.6 * unit, abs=0.05)
    # An interval without width is drawn; rankings of one layer have lines of their own.
    assert second.get("x1") == second.get("x2")
    assert first.get("y1") == mark.get("cy") != second.get("y1")
    assert len(bars) == 2


@pytest.mark.parametrize("value", [None, 0.2])
def test_dots_without_interval_or_null_are_drawn(value: float | None) -> None:
    chart = dot_chart([("l", [Dot("contribution", value, "c"), Dot("activation", value, "a")])], Axis("x"), label="x")
    assert "nan" not in chart
    assert "interval" not in chart
