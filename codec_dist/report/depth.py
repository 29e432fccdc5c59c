"""Charts over depth: statistics, numbers of modes, completeness; each with its numbers as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from codec_dist.report.charts import Axis, Bar, Line, Point, bar_chart, layer_axis, line_chart
from codec_dist.report.formatting import number
from codec_dist.report.run_data import ACTIVATION, CONTRIBUTION, RANDOM, Row, RunData

KINDS = (CONTRIBUTION, ACTIVATION)
PLURAL = {CONTRIBUTION: "contributions", ACTIVATION: "activations", RANDOM: "random channels"}
GOOD_RESIDUAL, FAIR_RESIDUAL = 0.05, 0.2
UNIT_NAMES = {"mode": "modes", "channel": "channels"}


@dataclass(frozen=True)
class Table:
    """Numbers as text; the first column names rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, what it says in a sentence, and its numbers."""

    title: str
    caption: str
    chart: Markup
    table: Table


@dataclass(frozen=True)
class Advice:
    """A verdict on trust: the class of its badge, a word or two, and a sentence."""

    verdict: str
    word: str
    sentence: str


def statistics_figures(data: RunData) -> list[Figure]:
    """Hoyer sparsity, dimensionality and E/I correlation by layer; those that were not measured are left out."""
    if not data.statistics:
        return []
    figures = [
        _figure(
            data,
            "Sparsity",
            "Hoyer sparsity of each image's vector over channels: 0 is even, 1 is a single channel. "
            "Line: median over images; band: quartiles.",
            [_quartiles(data, kind, "hoyer", PLURAL[kind]) for kind in KINDS],
            Axis("Hoyer sparsity", cover=(0,)),
        ),
        _figure(
            data,
            "Dimensionality",
            "Principal components that hold 95 % of the variance of the class-mean vectors.",
            [_single(data, data.statistics, kind, "components_95", PLURAL[kind], quantity=kind) for kind in KINDS],
            Axis("components for 95 %", cover=(0,)),
        ),
        _figure(
            data,
            "Effective dimensionality",
            "Participation ratio of the class means: how many components would share their variance evenly. "
            "Unlike a count, it weighs every component.",
            [
                _single(data, data.statistics, kind, "participation_ratio", PLURAL[kind], quantity=kind)
                for kind in KINDS
            ],
            Axis("participation ratio", cover=(0,)),
        ),
        _figure(
            data,
            "Excitation and inhibition",
            "E/I correlation: across channels, how far inhibition (negative parts) goes with excitation "
            "(positive parts) in the same image. Line: median; band: quartiles.",
            [_quartiles(data, CONTRIBUTION, "ei", PLURAL[CONTRIBUTION])],
            Axis("E/I correlation", cover=(0, 1)),
            rule=0,
        ),
    ]
    return [figure for figure in figures if figure is not None]


def mode_figures(data: RunData) -> list[Figure]:
    """Numbers of modes, and how much modes and channels say about classes, by layer."""
    if not data.layer_counts:
        return []
    figures = []
    bars, rows = _count_bars(data)
    if bars:
        chart = bar_chart(bars, Axis("modes"), label="Modes by layer: all, alive, and class-correlated")
        columns = ["layer", "quantity", "modes", "alive", "class-correlated"]
        caption = (
            "All modes of each dictionary (pale), those that fire at least once (medium), and those whose "
            "loading correlates with a class above the threshold (full)."
        )
        figures.append(Figure("Alive and class-correlated modes", caption, chart, Table(columns, rows)))
    lines = [
        _single(
            data, data.layer_counts, kind, "median_top_correlation", f"{kind} {UNIT_NAMES[unit]}",
            dashed=unit == "channel", quantity=f"{kind}-positive", unit=unit,
        )
        for unit in ("mode", "channel") for kind in KINDS
    ]  # fmt: skip
    specific = _figure(
        data,
        "How class-specific they are",
        "Median over modes (solid) or raw channels (dashed) of the highest correlation with any class.",
        lines,
        Axis("median top correlation", cover=(0,)),
    )
    return figures + ([specific] if specific else [])


def residual_figure(data: RunData) -> Figure | None:
    """Relative completeness residual by layer, in per cent."""
    if data.store is None or not data.store.residuals:
        return None
    found = {residual.layer: residual for residual in data.store.residuals}
    points, rows = [], []
    for place, layer in enumerate(data.layers):
        item = found.get(layer)
        if item is None:
            points.append(Point(place, None))
            continue
        low, high = item.quartiles
        note = f"{layer}: median {number(100 * item.median)} %"
        points.append(Point(place, 100 * item.median, 100 * low, 100 * high, note))
        cells = [item.median, low, high, item.percentile_90]
        shown = [f"{number(100 * cell)} %" for cell in cells]
        rows.append([layer, *shown, number(item.absolute, 3), number(item.change, 3), number(item.images)])
    chart = line_chart(
        [Line("median", CONTRIBUTION, points)],
        layer_axis(data.layers),
        Axis("relative residual, %", cover=(0,)),
        label="Relative completeness residual by layer: median and quartiles over images",
    )
    over = "images of the evaluate part" if data.store.has_split else "stored images (there is no split yet)"
    caption = (
        "How far the contributions of a layer are from adding up to the change of the target, relative to that change. "
        "Smaller is better; learned points of the path, more steps and refinement (adaptive) make it smaller. "
        f"Line: median over {over}; band: quartiles."
    )
    columns = [
        "layer",
        "median",
        "first quartile",
        "third quartile",
        "90th percentile",
        "median |residual|",
        "median |ΔT|",
        "images",
    ]
    return Figure("Completeness", caption, chart, Table(columns, rows))


def completeness_advice(data: RunData) -> Advice | None:
    """What the completeness residual means for the trust in the contributions; None where there is none."""
    if data.store is None or not data.store.residuals:
        return None
    worst = max(data.store.residuals, key=lambda residual: residual.median)
    found = f"The median relative residual is {number(100 * worst.median, 1)} % at the worst layer ({worst.layer})"
    if worst.median <= GOOD_RESIDUAL:
        return Advice("holds", "complete", f"{found}: contributions add up to the change of the target.")
    if worst.median <= FAIR_RESIDUAL:
        return Advice(
            "partly",
            "nearly complete",
            f"{found}: more steps, or refined paths (adaptive), would bring contributions closer to adding up.",
        )
    return Advice(
        "does-not-hold",
        "not complete",
        f"{found}, that is {number(worst.absolute)} where the target changes by {number(worst.change)} from baseline "
        "to image: contributions do not add up. Use learned points, more steps or refined paths "
        "(attribution.method.options: points, steps, adaptive), or a baseline on which the target differs more.",
    )


def ranking_name(ranking: str) -> str:
    """A ranking of channels in words."""
    known = {"contribution-positive": "contribution modes", "activation-positive": "activation modes"}
    return known.get(ranking, "random channels" if ranking == RANDOM else ranking)


def _figure(
    data: RunData, title: str, caption: str, lines: Sequence[Line], y: Axis, rule: float | None = None
) -> Figure | None:
    """A line chart over layers; None where nothing was measured."""
    shown = [line for line in lines if any(point.y is not None for point in line.points)]
    if not shown:
        return None
    chart = line_chart(shown, layer_axis(data.layers), y, label=f"{title} by layer. {caption}", rule=rule)
    rows = []
    for place, layer in enumerate(data.layers):
        points = [line.points[place] for line in shown]
        rows.append([layer, *(_with_bounds(point) for point in points)])
    return Figure(title, caption, chart, Table(["layer", *(line.name for line in shown)], rows))


def _quartiles(data: RunData, kind: str, statistic: str, name: str) -> Line:
    def column(part: str) -> list[float | None]:
        return data.by_layer(data.statistics, f"{statistic}_{part}", quantity=kind)

    values = zip(column("median"), column("q1"), column("q3"), strict=True)
    points = [Point(place, *three, _note(data, place, name, three[0])) for place, three in enumerate(values)]
    return Line(name, kind, points)


def _single(
    data: RunData, rows: Sequence[Row], kind: str, column: str, name: str, dashed: bool = False, **equal: str
) -> Line:
    values = data.by_layer(rows, column, **equal)
    points = [Point(place, value, note=_note(data, place, name, value)) for place, value in enumerate(values)]
    return Line(name, kind, points, dashed)


def _count_bars(data: RunData) -> tuple[list[tuple[str, list[Bar]]], list[list[str]]]:
    counts: dict[tuple[str, str], Row] = {
        (row["layer"], row["quantity"]): row for row in data.layer_counts if row["unit"] == "mode"
    }
    quantities = sorted({quantity for _, quantity in counts}, key=_order)
    bars, rows = [], []
    for layer in data.layers:
        of_layer = []
        for quantity in quantities:
            row = counts.get((layer, quantity))
            if row is None:
                continue
            amounts = [row["modes"], row["alive"], row["modes_above_threshold"]]
            note = f"{layer}, {quantity}: {amounts[0]} modes, {amounts[1]} alive, {amounts[2]} class-correlated"
            of_layer.append(Bar(_style(quantity), amounts, note))
            rows.append([layer, quantity, *map(number, amounts)])
        if of_layer:
            bars.append((layer, of_layer))
    return bars, rows


def _order(quantity: str) -> tuple[int, str]:
    kind = quantity.partition("-")[0]
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), quantity)


def _style(quantity: str) -> str:
    kind = quantity.partition("-")[0].partition("[")[0]
    return kind if kind in (*KINDS, RANDOM) else "other"


def _note(data: RunData, place: int, name: str, value: float | None) -> str:
    return f"{data.layers[place]}, {name}: {number(value, 3)}"


def _with_bounds(point: Point, text: Callable[[float | None], str] = lambda value: number(value, 3)) -> str:
    if point.low is None or point.high is None:
        return text(point.y)
    return f"{text(point.y)} ({text(point.low)} – {text(point.high)})"
