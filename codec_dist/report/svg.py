"""The parts of a chart: scales, ticks, marks and text, as elements that escape what they hold."""

import math
from collections.abc import Sequence
from xml.etree import ElementTree as ET

from markupsafe import Markup

CHARACTER_WIDTH = 6.3
"""Mean width in user units of a character of the charts' 12-unit text; used to leave room for labels."""


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
