"""The trained SAEs: held-out metrics, and how they got there."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from codec_dist.report.charts import Axis, Line, Point, line_chart
from codec_dist.report.formatting import duration, number, percent
from codec_dist.report.run_data import RunData, SaeFacts, quantity_kind

LOWEST_DRAWN = -0.25
KINDS = ("contribution", "activation", "random")


@dataclass(frozen=True)
class SaeRow:
    """A row of the table of SAEs."""

    layer: str
    quantity: str
    kind: str
    architecture: str
    options: str
    selected: bool
    cells: Sequence[tuple[float | None, str]]
    """Value to sort by, and its text."""


@dataclass(frozen=True)
class TrainingChart:
    """Explained variance over epochs, of the SAEs of one layer."""

    layer: str
    chart: Markup


METRICS = ("modes", "EV", "L0", "dead", "cosine", "Hoyer of modes", "training")


def sae_rows(data: RunData) -> list[SaeRow]:
    """One row per SAE, in the order of layers."""
    order = {layer: place for place, layer in enumerate(data.layers)}
    saes = sorted(data.saes, key=lambda sae: (order.get(sae.layer, len(order)), _place(sae), not sae.selected))
    return [_row(sae) for sae in saes]


def training_charts(data: RunData) -> list[TrainingChart]:
    """One small chart per layer; layers without a history are left out."""
    charts = []
    for layer in data.layers:
        lines = [_line(sae) for sae in data.saes if sae.layer == layer and sae.history]
        if lines:
            chart = line_chart(
                lines,
                Axis("epoch"),
                Axis("EV on select", cover=(0, 1)),
                label=f"Explained variance on the select part over epochs, SAEs of {layer}",
                size=(300, 190),
                named=False,
            )
            charts.append(TrainingChart(layer, chart))
    return charts


def _row(sae: SaeFacts) -> SaeRow:
    report, seconds = sae.evaluate, (sae.metrics.get("training") or {}).get("seconds")
    modes = sae.options.get("modes")
    cells = [
        (modes, number(modes)),
        (report.get("ev"), number(report.get("ev"), 3)),
        (report.get("l0"), number(report.get("l0"), 2)),
        (report.get("dead_fraction"), percent(report.get("dead_fraction"))),
        (report.get("cosine"), number(report.get("cosine"), 3)),
        (report.get("hoyer_dictionary"), number(report.get("hoyer_dictionary"), 2)),
        (seconds, duration(seconds) if seconds is not None else "–"),
    ]
    options = ", ".join(f"{name} = {value}" for name, value in sae.options.items() if value is not None)
    return SaeRow(
        sae.layer, sae.quantity, _kind(sae), str(sae.metrics["architecture"]), options, sae.selected, cells
    )  # fmt: skip


def _line(sae: SaeFacts) -> Line:
    name = f"{sae.quantity}, {sae.metrics['architecture']}"
    points = []
    for entry in sae.history:
        ev = entry.get("ev")
        shown = None if ev is None else max(ev, LOWEST_DRAWN)
        points.append(Point(entry["epoch"], shown, note=f"{name}, epoch {entry['epoch']}: EV {number(ev, 3)}"))
    return Line(name, _kind(sae), points, dashed=not sae.selected)


def _place(sae: SaeFacts) -> tuple[int, str]:
    return KINDS.index(_kind(sae)) if _kind(sae) in KINDS else len(KINDS), sae.quantity


def _kind(sae: SaeFacts) -> str:
    kind = quantity_kind(sae.quantity)
    return kind if kind in KINDS else "other"
