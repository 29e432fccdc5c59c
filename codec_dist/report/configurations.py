"""SAEs that differ in nothing but their seed, taken together, and which of their settings are worth showing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from codec_dist.report.run_data import RunData, SaeFacts
from codec_dist.sae import ARCHITECTURES

# How sparse an SAE is follows from these, so they are shown even where they are the defaults.
SPARSITY = ("k", "threshold", "l1", "l0")


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


def configurations(data: RunData) -> list[Configuration]:
    """All of a run, in the order in which its SAEs were read."""
    shown = _settings(data.saes)
    groups: dict[str, list[SaeFacts]] = {}
    for sae in data.saes:
        groups.setdefault(sae.configuration, []).append(sae)
    return [Configuration(saes, shown[id(saes[0])]) for saes in groups.values()]


def _settings(saes: Sequence[SaeFacts]) -> dict[int, str]:
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
            shown[id(sae)] = ", ".join(f"{name} = {_text(value)}" for name, value in values.items())
    return shown


def _varying(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names whose values are not the same in all that have them."""
    names = {name for one in settings for name in one}
    return {name for name in names if len({repr(one[name]) for one in settings if name in one}) > 1}


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


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)
