"""The trained SAEs: held-out metrics, how they got there, and why one of several is used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from markupsafe import Markup

from codec_dist.report.charts import Axis, Line, Point, line_chart
from codec_dist.report.formatting import duration, number, percent
from codec_dist.report.run_data import RunData, SaeFacts, quantity_kind
from codec_dist.sae import ARCHITECTURES

LOWEST_DRAWN = -0.25
MOST_LINES = 12
KINDS = ("contribution", "activation", "random")

# How sparse an SAE is follows from these, so they are shown even where they are the defaults.
SPARSITY = ("k", "threshold", "l1", "l0")


@dataclass(frozen=True)
class SaeTable:
    """A row for every configuration: SAEs that differ only in their seed are one."""

    metrics: Sequence[str]
    """Heads of the columns of numbers."""
    rows: Sequence["SaeRow"]
    seeds: bool
    """Whether anything was trained with several seeds, so that numbers are means."""


@dataclass(frozen=True)
class SaeRow:
    """A row of the table of SAEs."""

    layer: str
    quantity: str
    kind: str
    architecture: str
    settings: str
    selected: bool
    cells: Sequence[tuple[float | None, str]]
    """Value to sort by, and its text."""


@dataclass(frozen=True)
class Reason:
    """Why an SAE is used."""

    layer: str
    quantity: str
    kind: str
    sae: str
    reason: str


@dataclass(frozen=True)
class TrainingChart:
    """Explained variance over epochs, of the SAEs of one layer."""

    layer: str
    chart: Markup
    drawn: int
    trained: int


@dataclass(frozen=True)
class Configuration:
    """The seeds of one SAE."""

    saes: Sequence[SaeFacts]
    settings: str
    """What sets it apart: settings that differ from the defaults, from those of other SAEs, or say how sparse it is."""

    @property
    def first(self) -> SaeFacts:
        """The one that is used, else that of the lowest seed."""
        return next((sae for sae in self.saes if sae.selected), self.saes[0])

    @property
    def selected(self) -> bool:
        """Whether later stages use one of its seeds."""
        return any(sae.selected for sae in self.saes)

    @property
    def modes(self) -> int | None:
        """Rows of the dictionary."""
        modes: int | None = self.first.options.get("modes")
        return modes

    @cached_property
    def stability(self) -> float | None:
        """Mean over seeds; None for a single seed."""
        known = [sae.stability for sae in self.saes if sae.stability is not None]
        return fmean(known) if known else None

    def values(self, metric: str, part: str = "evaluate") -> list[float]:
        """The metric of every seed that has it."""
        reports = [sae.metrics.get(part) or {} for sae in self.saes]
        return [report[metric] for report in reports if report.get(metric) is not None]

    def mean(self, metric: str, part: str = "evaluate") -> float | None:
        """Mean over seeds; None where no seed has it."""
        values = self.values(metric, part)
        return fmean(values) if values else None


def sae_table(data: RunData, configurations: Sequence[Configuration]) -> SaeTable:
    """All SAEs, in the order of layers, those in use first."""
    order = {layer: place for place, layer in enumerate(data.layers)}
    ordered = sorted(
        configurations,
        key=lambda item: (
            order.get(item.first.layer, len(order)), _place(item.first), not item.selected, item.mean("l0") or 0.0,
        ),
    )  # fmt: skip
    seeds = any(len(item.saes) > 1 for item in configurations)
    metrics = ["modes", "EV", "L0", "dead", *(["stability", "seeds"] if seeds else [])]
    metrics += ["cosine", "Hoyer of modes", "training"]
    return SaeTable(metrics, [_row(item, seeds) for item in ordered], seeds)


def reasons(data: RunData, configurations: Sequence[Configuration]) -> list[Reason]:
    """Why each SAE in use was chosen; those that had no rival are left out."""
    used = {(item.first.layer, item.first.quantity): item for item in configurations if item.selected}
    places = {layer: place for place, layer in enumerate(data.layers)}
    found = []
    for (layer, quantity), reason in data.reasons.items():
        if reason and (item := used.get((layer, quantity))) is not None:
            name = f"{item.first.architecture}, {number(item.modes)} modes"
            sae = f"{name}, {item.settings}" if item.settings else name
            found.append(Reason(layer, quantity, _kind(item.first), sae, reason))
    return sorted(
        found, key=lambda item: (places.get(item.layer, len(places)), item.quantity[:1] != "c", item.quantity)
    )


def criterion(data: RunData) -> str:
    """The rule by which SAEs were chosen, in words."""
    rule = data.criterion
    if not rule:
        return "one, named in sae/selected.json"
    if rule.get("l0") is not None:
        more = f" ({number(100 * rule.get('tolerance', 0), 0)} % more are let pass)" if rule.get("tolerance") else ""
        words = f"the one with the highest EV among those with at most {rule['l0']:g} loadings per image{more}"
    else:
        words = f"the sparsest that keeps {100 * rule['ev_kept']:g} % of the highest EV"
    stable = rule.get("minimum_stability")
    return words + (f", with a stability over seeds of {stable:g} or more" if stable is not None else "")


def training_charts(data: RunData) -> list[TrainingChart]:
    """One small chart per layer; layers without a history are left out.

    Of more than ``MOST_LINES`` SAEs of a layer only those in use are drawn.
    """
    charts = []
    for layer in data.layers:
        trained = [sae for sae in data.saes if sae.layer == layer and sae.history]
        drawn = trained if len(trained) <= MOST_LINES else [sae for sae in trained if sae.selected]
        if drawn:
            chart = line_chart(
                [_line(sae) for sae in drawn],
                Axis("epoch"),
                Axis("EV on select", cover=(0, 1)),
                label=f"Explained variance on the select part over epochs, SAEs of {layer}",
                size=(300, 190),
                named=False,
            )
            charts.append(TrainingChart(layer, chart, len(drawn), len(trained)))
    return charts


def _row(item: Configuration, seeds: bool) -> SaeRow:
    times = [(sae.metrics.get("training") or {}).get("seconds") for sae in item.saes]
    known = [time for time in times if time is not None]
    seconds = sum(known) if known else None
    ev, l0, dead = (item.mean(name) for name in ("ev", "l0", "dead_fraction"))
    cosine, hoyer = item.mean("cosine"), item.mean("hoyer_dictionary")
    cells = [(item.modes, number(item.modes)), (ev, number(ev, 3)), (l0, number(l0, 2)), (dead, percent(dead))]
    if seeds:
        cells += [(item.stability, number(item.stability)), (len(item.saes), number(len(item.saes)))]
    cells += [(cosine, number(cosine, 3)), (hoyer, number(hoyer, 2))]
    cells.append((seconds, duration(seconds) if seconds is not None else "–"))
    first = item.first
    return SaeRow(
        first.layer, first.quantity, _kind(first), first.architecture, item.settings, item.selected, cells
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


# ---- SAEs that differ in nothing but their seed, taken together, and which of their settings are worth showing


def configurations(data: RunData) -> list[Configuration]:
    """All of a run, in the order in which its SAEs were read."""
    shown = _shared_settings(data.saes)
    groups: dict[str, list[SaeFacts]] = {}
    for sae in data.saes:
        groups.setdefault(sae.configuration, []).append(sae)
    return [Configuration(saes, shown[id(saes[0])]) for saes in groups.values()]


def _shared_settings(saes: Sequence[SaeFacts]) -> dict[int, str]:
    """The settings of each SAE that are worth showing, as text, by its id."""
    # Only among layers of one width, since some defaults follow from it.
    groups: dict[tuple[str, int | None], list[SaeFacts]] = {}
    for sae in saes:
        groups.setdefault((sae.architecture, sae.channels), []).append(sae)
    shown = {}
    for alike in groups.values():
        varying = _varying([sae.options for sae in alike])
        training = _varying([sae.training for sae in alike])
        for sae in alike:
            defaults = _defaults(sae)
            options = {
                name: value
                for name, value in sae.options.items()
                if name != "modes"
                and value is not None
                and (name in varying or name in SPARSITY or name not in defaults or value != defaults[name])
            }
            sparsity = {name: options.pop(name) for name in SPARSITY if name in options}
            values = sparsity | options | {name: sae.training[name] for name in sae.training if name in training}
            shown[id(sae)] = ", ".join(f"{name} = {_value_as_text(value)}" for name, value in values.items())
    return shown


def _varying(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names whose values are not the same in all that have them."""
    names = {name for item in settings for name in item}
    return {name for name in names if len({repr(item[name]) for item in settings if name in item}) > 1}


def _defaults(sae: SaeFacts) -> Mapping[str, Any]:
    """The options that its architecture has of itself, for this many channels and modes."""
    if sae.architecture not in ARCHITECTURES or sae.channels is None:
        return {}
    kind = getattr(ARCHITECTURES.factory(sae.architecture), "option_type", None)
    if kind is None:
        return {}
    # The default k may not fit these modes, so that what is shown anyway is taken as it is.
    given = {name: value for name, value in sae.options.items() if name in ("modes", *SPARSITY)}
    try:
        plain: dict[str, Any] = kind(**given).resolve(sae.channels).plain()
    except (TypeError, ValueError):
        return {}
    return plain


def _value_as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_value_as_text, value))
    return str(value)
