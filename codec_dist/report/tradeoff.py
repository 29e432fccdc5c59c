"""How much an SAE explains against how sparse it is, by layer and quantity, with the one that is used."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from codec_dist.report.charts import CHARACTER_WIDTH, MARKERS, Axis, Canvas, Scale, draw_axes, nice_ticks, spread
from codec_dist.report.depth import Table
from codec_dist.report.formatting import number
from codec_dist.report.run_data import RunData, quantity_kind
from codec_dist.report.saes import Configuration

LOWEST_DRAWN = -0.25
SMALLEST_L0 = 0.05
ROUND_L0 = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SAME_L0 = 1.05
SMALL, LARGE = 3.2, 6.0
KINDS = ("contribution", "activation", "random")
Measure = Callable[[Configuration], float | None]


@dataclass(frozen=True)
class TradeOff:
    """The trade-off of one layer and quantity."""

    quantity: str
    kind: str
    reason: str
    """Why the used SAE is used."""
    explained: Markup
    stability: Markup | None
    """The stability of modes over seeds; None where nothing was trained with several seeds."""
    table: Table


@dataclass(frozen=True)
class LayerTradeOff:
    """A tab."""

    layer: str
    quantities: Sequence[TradeOff]


def trade_offs(data: RunData, configurations: Sequence[Configuration]) -> list[LayerTradeOff]:
    """Layers for which something was compared: at least two configurations of a quantity."""
    found = []
    for layer in data.layers:
        of_layer = [point for point in configurations if point.first.layer == layer]
        quantities = sorted({point.first.quantity for point in of_layer}, key=lambda name: (name[:1] != "c", name))
        panels = [
            _trade_off(data, layer, quantity, alike)
            for quantity in quantities
            if len(alike := [point for point in of_layer if point.first.quantity == quantity]) > 1
        ]
        if panels:
            found.append(LayerTradeOff(layer, panels))
    return found


def _trade_off(data: RunData, layer: str, quantity: str, configurations: Sequence[Configuration]) -> TradeOff:
    ordered = sorted(configurations, key=lambda point: (point.mean("l0") or 0.0, point.settings))
    where = f"SAEs of {quantity} at {layer}"
    stable = any(point.stability is not None for point in ordered)
    return TradeOff(
        quantity,
        quantity_kind(quantity),
        data.reasons.get((layer, quantity), ""),
        trade_off_chart(
            ordered, _explained, Axis("EV", cover=(1,)), label=f"Explained variance against loadings per image, {where}"
        ),
        trade_off_chart(
            ordered, lambda point: point.stability, Axis("stability", cover=(0, 1)),
            label=f"Stability of modes over seeds against loadings per image, {where}",
        ) if stable else None,
        _table(ordered, stable),
    )  # fmt: skip


def trade_off_chart(
    configurations: Sequence[Configuration],
    measure: Measure,
    y: Axis,
    *,
    label: str,
    size: tuple[float, float] = (460, 280),
) -> Markup:
    """Configurations as marks over L0 (a logarithmic axis), with a line through those whose EV nothing sparser reaches.

    Each architecture has its own line, named at its end where there are several. A mark is the mean over seeds, a
    whisker reaches from the lowest to the highest EV; larger marks have larger dictionaries; a ring is around the one
    in use.
    """
    marks = [
        _Mark(point, max(l0, SMALLEST_L0), max(value, LOWEST_DRAWN))
        for point in configurations
        if (l0 := point.mean("l0")) is not None and (value := measure(point)) is not None
    ]
    architectures = list(dict.fromkeys(mark.architecture for mark in marks))
    names = architectures if len(architectures) > 1 else []
    canvas = Canvas(*size, label, "tradeoff")
    values = [mark.value for mark in marks] + list(y.cover)
    ticks = [(tick, y.format(tick)) for tick in nice_ticks(min(values, default=0), max(values, default=1))]
    left = 26 + CHARACTER_WIDTH * max(len(text) for _, text in ticks)
    right = size[0] - (14 + CHARACTER_WIDTH * max(map(len, names)) if names else 14)
    top, bottom = 14, size[1] - 44
    vertical = Scale(ticks[0][0], ticks[-1][0], bottom, top)
    logs = [math.log2(mark.l0) for mark in marks]
    # At least one doubling, so that what is equal but for noise is not torn apart.
    low, high = min(logs, default=0), max(logs, default=1)
    low, high = (low, high) if high - low >= 1 else ((low + high - 1) / 2, (low + high + 1) / 2)
    horizontal = Scale(low, high, left + 14, right - 14)
    draw_axes(canvas, (left, right, top, bottom), horizontal, vertical, _l0_axis(low, high), y, ticks)

    def place(mark: _Mark) -> tuple[float, float]:
        return horizontal(math.log2(mark.l0)), vertical(mark.value)

    fronts = [_front([mark for mark in marks if mark.architecture == name]) for name in architectures]
    for front in fronts:
        canvas.path([place(mark) for mark in front], f"line front {front[0].style}")
    on_front = {id(mark) for front in fronts for mark in front}
    # Those on a line, and the one in use, are drawn over the others.
    for mark in sorted(marks, key=lambda mark: (mark.point.selected, id(mark) in on_front)):
        at, height = place(mark)
        seeds = [max(ev, LOWEST_DRAWN) for ev in mark.point.values("ev")] if measure is _explained else []
        if len(seeds) > 1:
            canvas.line(at, vertical(min(seeds)), at, vertical(max(seeds)), f"whisker {mark.style}")
        radius = _radius(mark.point, configurations)
        if mark.point.selected:
            canvas.add("circle", "ring", "", cx=at, cy=height, r=radius + 4.5)
        style = f"mark {mark.style}" + ("" if id(mark) in on_front else " hollow")
        canvas.marker(at, height, MARKERS.get(mark.style, "diamond"), style, _note(mark.point), radius)
    if names:
        ends = [front[-1] for front in fronts]
        heights = spread([vertical(mark.value) for mark in ends], 15, top + 4, bottom)
        for mark, height in zip(ends, heights, strict=True):
            canvas.text(min(place(mark)[0] + 12, right - 2), height + 4, mark.architecture, f"name {mark.style}")
    return canvas.markup()


@dataclass(frozen=True)
class _Mark:
    point: Configuration
    l0: float
    value: float

    @property
    def architecture(self) -> str:
        return self.point.first.architecture

    @property
    def style(self) -> str:
        kind = quantity_kind(self.point.first.quantity)
        return kind if kind in KINDS else "other"


def _front(marks: Sequence[_Mark]) -> list[_Mark]:
    """Those whose EV no sparser one reaches, from sparse to dense; an L0 within ``SAME_L0`` counts as the same."""

    def explained(mark: _Mark) -> float:
        ev = _explained(mark.point)
        return -math.inf if ev is None else ev

    def excelled(mark: _Mark) -> bool:
        rivals = (other for other in marks if other is not mark and other.l0 <= mark.l0 * SAME_L0)
        return any(explained(other) > explained(mark) for other in rivals)

    front = [mark for mark in marks if not excelled(mark)]
    return sorted(front, key=lambda mark: mark.l0)


def _radius(point: Configuration, others: Sequence[Configuration]) -> float:
    """Larger for larger dictionaries, by rank among the sizes that there are."""
    sizes = sorted({other.modes for other in others if other.modes is not None})
    if point.modes is None or len(sizes) < 2:
        return 4.2
    return SMALL + (LARGE - SMALL) * sizes.index(point.modes) / (len(sizes) - 1)


def _l0_axis(low: float, high: float) -> Axis:
    few = [value for value in ROUND_L0 if low - 0.2 <= math.log2(value) <= high + 0.2]
    ticks = [(math.log2(value), f"{value:g}") for value in few if low <= math.log2(value) <= high]
    if len(ticks) < 2:  # a short stretch: its ends
        ticks = [(place, f"{2**place:.3g}") for place in (low, (low + high) / 2, high)]
    return Axis("L0, loadings per image (log scale)", ticks)


def _explained(point: Configuration) -> float | None:
    return point.mean("ev")


def _note(point: Configuration) -> str:
    parts = [
        f"{point.first.architecture}, {number(point.modes)} modes" + (f", {point.settings}" if point.settings else ""),
        f"L0 {number(point.mean('l0'))}, EV {number(point.mean('ev'), 3)}",
    ]
    if point.stability is not None:
        parts.append(f"stability {number(point.stability)} over {len(point.saes)} seeds")
    return "; ".join([*parts, *(["used by later stages"] if point.selected else [])])


def _table(configurations: Sequence[Configuration], stable: bool) -> Table:
    columns = ["architecture", "settings", "modes", "L0", "EV", "EV on select", "dead"]
    columns += ["seeds", "stability"] if stable else []
    rows = []
    for point in configurations:
        dead = point.mean("dead_fraction")
        row = [
            point.first.architecture,
            point.settings or "as by default",
            number(point.modes),
            number(point.mean("l0")),
            number(point.mean("ev"), 3),
            number(point.mean("ev", "select"), 3),
            "–" if dead is None else f"{number(100 * dead, 1)} %",
        ]
        row += [number(len(point.saes)), number(point.stability)] if stable else []
        rows.append([*row, "✓" if point.selected else ""])
    return Table([*columns, "used"], rows)
