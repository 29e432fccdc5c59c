"""The kinds of charts in the report (lines, bars within bars, dots by row), and the parts of which they are drawn."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

from markupsafe import Markup

from codec_dist.report.formatting import number

MARKERS = {"contribution": "circle", "activation": "square", "random": "triangle"}

CHARACTER_WIDTH = 6.3
"""Mean width in user units of a character of the charts' 12-unit text; used to leave room for labels."""


@dataclass(frozen=True)
class Point:
    """A point of a line; ``low`` and ``high`` bound it where its spread or error is known."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart; ``style`` is the class that gives its colour: contribution, activation, random, other."""

    name: str
    style: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What is written along an axis, and the least range that it covers."""

    label: str
    ticks: Sequence[tuple[float, str]] = ()
    """Positions and their text; none: round numbers."""
    cover: Sequence[float] = ()
    """Values that are in sight whatever the data."""
    format: Callable[[float], str] = field(default=lambda value: f"{value:g}".replace("-", "−"))


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    label: str,
    size: tuple[float, float] = (560, 300),
    named: bool = True,
    rule: float | None = None,
) -> Markup:
    """Lines with markers; a band shows what lies between ``low`` and ``high``.

    Args:
        lines: in the order in which they are drawn.
        x: horizontal axis.
        y: vertical axis.
        label: the chart in words.
        size: width and height in user units.
        named: write each line's name at its end.
        rule: a value of y at which a thin line is drawn.
    """
    canvas = Canvas(*size, label, "lines")
    names = [line.name for line in lines if any(point.y is not None for point in line.points)] if named else []
    # A line of all but one undefined value still has one point to show.
    values = [
        value for line in lines for point in line.points for value in (point.y, point.low, point.high)
        if value is not None
    ]  # fmt: skip
    values += list(y.cover)
    ticks = y.ticks or [(tick, y.format(tick)) for tick in nice_ticks(min(values, default=0), max(values, default=1))]
    left = 26 + CHARACTER_WIDTH * max(len(text) for _, text in ticks)
    right = size[0] - (18 + CHARACTER_WIDTH * max(map(len, names)) if names else 12)
    top, bottom = 14, size[1] - 44
    vertical = Scale(ticks[0][0], ticks[-1][0], bottom, top)
    places = [point.x for line in lines for point in line.points] + [place for place, _ in x.ticks]
    low, high = min(places, default=0), max(places, default=1)
    inset = 10 if low < high else (right - left) / 2
    horizontal = Scale(low, high, left + inset, right - inset if low < high else right)
    draw_axes(canvas, (left, right, top, bottom), horizontal, vertical, x, y, ticks, rule)
    for line in lines:
        _draw_band(canvas, line, horizontal, vertical)
    for line in lines:
        _draw_line(canvas, line, horizontal, vertical)
    if named:
        _draw_names(canvas, lines, horizontal, vertical, right, (top, bottom))
    return canvas.markup()


@dataclass(frozen=True)
class Bar:
    """Nested amounts of one kind: the first is the widest, each next lies within it."""

    style: str
    amounts: Sequence[float]
    note: str


def bar_chart(rows: Sequence[tuple[str, Sequence[Bar]]], axis: Axis, *, label: str, width: float = 560) -> Markup:
    """Bars within bars, from left to right, grouped by row."""
    thickness, gap, group_gap = 11, 3, 12
    names = max((len(name) for name, _ in rows), default=0)
    left, right, top = 16 + CHARACTER_WIDTH * min(names, 24), width - 16, 8
    height = top + sum(len(bars) * (thickness + gap) + group_gap for _, bars in rows) + 40
    canvas = Canvas(width, height, label, "bars")
    most = max((bar.amounts[0] for _, bars in rows for bar in bars), default=1)
    ticks = nice_ticks(0, most)
    scale = Scale(0, ticks[-1], left, right)
    bottom = height - 40
    _draw_columns(canvas, scale, [(tick, axis.format(tick)) for tick in ticks], (top, bottom), axis.label)
    position: float = top + group_gap / 2
    for name, bars in rows:
        middle = position + (len(bars) * (thickness + gap) - gap) / 2
        canvas.text(left - 8, middle + 4, _shortened(name, 24), "tick", "end")
        for bar in bars:
            for depth, amount in enumerate(bar.amounts):
                style = f"bar {bar.style} depth-{depth}"
                inner = 0 if depth < 2 else 2.5
                canvas.add(
                    "rect", style, bar.note, x=left, y=position + inner, rx=2,
                    width=max(scale(amount) - left, 0), height=thickness - 2 * inner,
                )  # fmt: skip
            position += thickness + gap
        position += group_gap
    return canvas.markup()


@dataclass(frozen=True)
class Dot:
    """A value in a row, with its interval and what chance gives, where they are known."""

    style: str
    value: float | None
    note: str
    low: float | None = None
    high: float | None = None
    chance: tuple[float, float, float] | None = None
    """Low end, mean and high end of the values under chance."""
    chance_note: str = ""

    @property
    def values(self) -> list[float]:
        """All that must be in sight."""
        return [value for value in (self.value, self.low, self.high, *(self.chance or ())) if value is not None]


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], axis: Axis, *, label: str, width: float = 560) -> Markup:
    """One row per layer, one mark per kind, along a common scale.

    Marks lie on one line; where intervals or chance are known, each has a line of its own in the row: a bar for
    chance, a whisker for the interval.
    """
    ranged = max((len(dots) for _, dots in rows if any(len(dot.values) > 1 for dot in dots)), default=1)
    lane, top = 15, 8
    pitch = 28 if ranged == 1 else 12 + lane * ranged
    names = max((len(name) for name, _ in rows), default=0)
    left, right = 16 + CHARACTER_WIDTH * min(names, 24), width - 20
    height = top + pitch * len(rows) + 44
    canvas = Canvas(width, height, label, "dots")
    values = [value for _, dots in rows for dot in dots for value in dot.values] + list(axis.cover)
    ticks = nice_ticks(min(values, default=0), max(values, default=1))
    scale = Scale(ticks[0], ticks[-1], left, right)
    bottom = height - 44
    _draw_columns(canvas, scale, [(tick, axis.format(tick)) for tick in ticks], (top, bottom), axis.label)
    if ticks[0] < 0 < ticks[-1]:
        canvas.line(scale(0), top, scale(0), bottom, "rule")
    for place, (name, dots) in enumerate(rows):
        y = top + pitch * (place + 0.5)
        canvas.text(left - 8, y + 4, _shortened(name, 24), "tick", "end")
        known = [dot.value for dot in dots if dot.value is not None]
        if ranged == 1 and len(known) > 1:
            canvas.line(scale(min(known)), y, scale(max(known)), y, "range")
        for number_of_dot, dot in enumerate(dots):
            shift = lane * (number_of_dot - (len(dots) - 1) / 2) if ranged > 1 else 0
            _draw_dot(canvas, dot, scale, y + shift)
    return canvas.markup()


class Canvas:
    """An SVG image of fixed proportions; its colours come from the page's style sheet by class.

    Args:
        width: of the drawing, in user units.
        height: of the drawing, in user units.
        label: what the chart shows, for those who cannot see it.
        style: further class of the image.
    """

    def __init__(self, width: float, height: float, label: str, style: str = "") -> None:
        self.width, self.height = width, height
        self._root = ET.Element(
            "svg",
            {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label, "class": f"chart {style}"},
        )

    def add(self, tag: str, style: str = "", title: str = "", **attributes: float | str) -> ET.Element:
        """Add an element; ``title`` is shown when the pointer rests on it."""
        named = {name.replace("_", "-"): _text(value) for name, value in attributes.items()}
        element = ET.SubElement(self._root, tag, {"class": style, **named} if style else named)
        if title:
            ET.SubElement(element, "title").text = title
        return element

    def text(self, x: float, y: float, content: str, style: str = "", anchor: str = "start", turn: float = 0) -> None:
        """Write text at a baseline; ``turn`` in degrees."""
        rotation = {"transform": f"rotate({turn:g} {x:g} {y:g})"} if turn else {}
        element = self.add("text", style, "", x=x, y=y, text_anchor=anchor, **rotation)
        element.text = content

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Draw a straight line."""
        self.add("line", style, "", x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> None:
        """Draw a line through points, or the area within them."""
        if points:
            steps = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
            self.add("path", style, "", d=f"M{steps}{'Z' if closed else ''}")

    def marker(self, x: float, y: float, shape: str, style: str, title: str, radius: float = 4) -> None:
        """Draw a circle, square, triangle or diamond."""
        if shape == "circle":
            self.add("circle", style, title, cx=x, cy=y, r=radius)
            return
        corners = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "triangle": [(0, -1.15), (1.05, 0.8), (-1.05, 0.8)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        }[shape]
        steps = "L".join(f"{x + radius * dx:.2f} {y + radius * dy:.2f}" for dx, dy in corners)
        self.add("path", style, title, d=f"M{steps}Z")

    def markup(self) -> Markup:
        """The image as HTML."""
        return Markup(ET.tostring(self._root, encoding="unicode"))


class Scale:
    """A linear map from values to positions."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, (high if high > low else low + 1)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def _draw_dot(canvas: Canvas, dot: Dot, scale: Scale, y: float) -> None:
    if dot.chance is not None:
        low, mean, high = map(scale, dot.chance)
        canvas.add(
            "rect", "bar random depth-1", dot.chance_note, x=low, y=y - 5, rx=2, width=max(high - low, 1), height=10
        )
        canvas.line(mean, y - 5, mean, y + 5, "tick-mark random")
    if dot.low is not None and dot.high is not None:
        canvas.line(scale(dot.low), y, scale(dot.high), y, f"interval {dot.style}")
    if dot.value is not None:
        canvas.marker(scale(dot.value), y, MARKERS.get(dot.style, "diamond"), f"mark {dot.style}", dot.note, 5)


def layer_axis(layers: Sequence[str]) -> Axis:
    """The axis of depth: layer keys without what all begin with, each so many that they do not touch."""
    common = _common_prefix(layers)
    names = [layer[len(common) :] or layer for layer in layers]
    longest = max((len(name) for name in names), default=1)
    every = max(1, round(len(names) * (longest + 2) * CHARACTER_WIDTH / 400 + 0.49))
    ticks = [
        (float(place), _shortened(name, 12) if place % every == 0 else "") for place, name in enumerate(names)
    ]  # fmt: skip
    title = f"layer, input → output ({common}…)" if common else "layer, input → output"
    return Axis(title if len(layers) > 1 else "layer", ticks)


def _common_prefix(layers: Sequence[str]) -> str:
    """The modules that all layers lie in, such as ``blocks.``; empty for a single layer."""
    if len(layers) < 2:
        return ""
    modules = [layer.split(".")[:-1] for layer in layers]
    shared = [
        names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*modules, strict=False))
    ]
    return ".".join([*shared, ""])


def draw_axes(
    canvas: Canvas,
    frame: tuple[float, float, float, float],
    horizontal: Scale,
    vertical: Scale,
    x: Axis,
    y: Axis,
    ticks: Sequence[tuple[float, str]],
    rule: float | None = None,
) -> None:
    """Grid lines, ticks and labels of a chart within ``frame`` (left, right, top, bottom)."""
    left, right, top, bottom = frame
    for tick, text in ticks:
        canvas.line(left, vertical(tick), right, vertical(tick), "grid")
        canvas.text(left - 8, vertical(tick) + 4, text, "tick", "end")
    if rule is not None and vertical.low <= rule <= vertical.high:
        canvas.line(left, vertical(rule), right, vertical(rule), "rule")
    canvas.line(left, bottom, right, bottom, "axis")
    x_ticks = x.ticks or [
        (tick, x.format(tick)) for tick in nice_ticks(horizontal.low, horizontal.high, 4)
        if horizontal.low <= tick <= horizontal.high
    ]  # fmt: skip
    last = float("-inf")
    for place, text in x_ticks:
        at, half = horizontal(place), CHARACTER_WIDTH * len(text) / 2
        canvas.line(at, bottom, at, bottom + 4, "axis")
        if text and at - half > last + 3:
            canvas.text(at, bottom + 17, text, "tick", "middle")
            last = at + half
    canvas.text((left + right) / 2, canvas.height - 6, x.label, "label", "middle")
    canvas.text(13, (top + bottom) / 2, y.label, "label", "middle", -90)


def _draw_columns(
    canvas: Canvas, scale: Scale, ticks: Sequence[tuple[float, str]], span: tuple[float, float], label: str
) -> None:
    top, bottom = span
    for tick, text in ticks:
        canvas.line(scale(tick), top, scale(tick), bottom, "grid")
        canvas.text(scale(tick), bottom + 16, text, "tick", "middle")
    canvas.text((scale(ticks[0][0]) + scale(ticks[-1][0])) / 2, bottom + 34, label, "label", "middle")


def _draw_band(canvas: Canvas, line: Line, horizontal: Scale, vertical: Scale) -> None:
    for run in _runs(line.points):
        if len(run) == 1:
            (point,) = run
            if point.low is not None and point.high is not None:
                at = horizontal(point.x)
                canvas.line(at, vertical(point.low), at, vertical(point.high), f"whisker {line.style}")
            continue
        bounded = [point for point in run if point.low is not None and point.high is not None]
        upper = [(horizontal(point.x), vertical(point.high or 0)) for point in bounded]
        lower = [(horizontal(point.x), vertical(point.low or 0)) for point in bounded]
        canvas.path(upper + lower[::-1], f"band {line.style}", closed=True)


def _draw_line(canvas: Canvas, line: Line, horizontal: Scale, vertical: Scale) -> None:
    style = f"{line.style} dashed" if line.dashed else line.style
    for run in _runs(line.points):
        places = [(horizontal(point.x), vertical(point.y or 0)) for point in run]
        canvas.path(places, f"line {style}")
        radius = min(4 if len(run) <= 20 else 2, canvas.height / 70)
        for (at, height), point in zip(places, run, strict=True):
            note = point.note or f"{line.name}: {number(point.y, 3)}"
            hollow = " hollow" if line.dashed else ""
            canvas.marker(at, height, MARKERS.get(line.style, "diamond"), f"mark {line.style}{hollow}", note, radius)


def _draw_names(
    canvas: Canvas,
    lines: Sequence[Line],
    horizontal: Scale,
    vertical: Scale,
    right: float,
    span: tuple[float, float],
) -> None:
    ends = [(line, [point for point in line.points if point.y is not None]) for line in lines]
    shown = [(line, points[-1]) for line, points in ends if points]
    heights = spread([vertical(point.y or 0) for _, point in shown], 15, span[0] + 4, span[1])
    for (line, point), height in zip(shown, heights, strict=True):
        at = max(horizontal(point.x) + 10, right - 2)
        canvas.text(at, height + 4, line.name, f"name {line.style}")


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Stretches of neighbouring points that are defined."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point.y is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _shortened(name: str, most: int) -> str:
    """A long name without its beginning, which layers share more often than their end."""
    return name if len(name) <= most else "…" + name[-(most - 1) :]


# ---- Ticks and text


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-6 * max(1, abs(low), abs(high)):
        high = low + 1
    raw = (high - low) / max(about, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart so that none is nearer than ``gap`` to another, in the same order, within [low, high]."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for place, index in enumerate(order):
        least = low if place == 0 else moved[order[place - 1]] + gap
        moved[index] = max(positions[index], least)
    # What was pushed out at the end is pushed back, one after the other.
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
