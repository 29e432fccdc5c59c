"""Options of architectures: frozen dataclasses that check the types of what a config gives them."""

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, Signature
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Scaling = Literal["scalar", "per_channel", "none"]
DERIVED = ("expansion", "hidden_per_channel")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every architecture can be asked for."""

    modes: int | None = None
    """Rows of the dictionary."""
    scaling: Scaling = "scalar"
    """What rows are divided by: one standard deviation over everything (the paper), one per channel, or nothing."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise ValueError(f"{name} must be {_describe(kind)}, found {value!r}")
        if self.modes is not None and self.modes < 1:
            raise ValueError(f"modes must be at least 1, found {self.modes}")

    def resolve(self, channels: int) -> "Options":
        """These options with every default that depends on the number of channels filled in.

        Raises:
            ValueError: values that contradict each other or the number of channels.
        """
        return self if self.modes is not None else replace(self, modes=channels)

    def plain(self) -> dict[str, Any]:
        """JSON values from which the same SAE is built again."""
        values = {name: value for name, value in asdict(self).items() if name not in DERIVED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(Options):
    """What every architecture that is trained by gradient can be asked for."""

    expansion: int | float = 3
    """Modes per channel (the paper's N), where `modes` is not given."""
    nonnegative: bool = False
    """Let no mode take away from a channel: dictionary rows ≥ 0, after channels whose rows are all ≤ 0 were flipped."""
    dead_window: int = 10_000
    """A mode that has not fired for so many training samples counts as dead."""
    auxk: int | None = 0
    """Dead modes per row that help to explain the residual (AuxK); 0: none."""
    auxk_coefficient: int | float = 1 / 32
    """Weight of that auxiliary loss."""
    resample_every: int | None = None
    """Re-initialise dead modes to badly reconstructed rows every so many training samples; default: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion <= 0 or self.dead_window < 1:
            raise ValueError("expansion must be above 0 and dead_window at least 1")
        if self.resample_every is not None and self.resample_every < 1:
            raise ValueError(f"resample_every must be at least 1, found {self.resample_every}")
        if self.auxk_coefficient < 0 or (self.auxk or 0) < 0:
            raise ValueError("auxk and auxk_coefficient must not be negative")

    def resolve(self, channels: int) -> "TrainedOptions":
        modes = self.modes if self.modes is not None else max(1, round(self.expansion * channels))
        auxk = max(1, channels // 2) if self.auxk is None else self.auxk
        return replace(self, modes=modes, auxk=min(auxk, modes))


def signature(options: type[Options]) -> Signature:
    """The signature of a constructor that takes channels and these options by name."""
    hints = get_type_hints(options)
    first = Parameter("channels", Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
    fields = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[name])
        for name, field in options.__dataclass_fields__.items()
    ]
    return Signature([first, *fields])


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names under which two sets of options disagree."""
    return sorted(name for name in {*first, *other} if first.get(name) != other.get(name))


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Sequence:
        return isinstance(value, tuple | list) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    # True is an int to Python, but not to a person.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in parts))
    if origin is Sequence:
        return f"a list of {_describe(parts[0])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return words.get(kind, kind.__name__)
