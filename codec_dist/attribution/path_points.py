"""Where the path from baseline to image is evaluated: α of the points x₀ + α (x - x₀)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from codec_dist.attribution.errors import AttributionError
from codec_dist.utils import Registry

Fractions = tuple[float, ...]


class PathPoints(ABC):
    """A rule for the points of the path."""

    @abstractmethod
    def fractions(self, steps: int) -> Fractions:
        """α of ``steps + 1`` points, ascending from 0 to 1.

        Raises:
            AttributionError: the rule does not give that many points.
        """


POINTS: Registry[PathPoints] = Registry("path points", AttributionError)


@POINTS.register("uniform")
@dataclass(frozen=True)
class UniformPoints(PathPoints):
    """α = i/S, as in the paper."""

    def fractions(self, steps: int) -> Fractions:
        """Equal steps."""
        return tuple(step / steps for step in range(steps + 1))


@POINTS.register("power")
@dataclass(frozen=True)
class PowerPoints(PathPoints):
    """α = (i/S)ᵖ: closer to each other near the baseline, where most of the change happens.

    Args:
        exponent: p, at least 1; 1 is uniform.
    """

    exponent: int | float = 2.0

    def __post_init__(self) -> None:
        number = isinstance(self.exponent, int | float) and not isinstance(self.exponent, bool)
        if not number or not 1 <= self.exponent < math.inf:
            raise AttributionError(f"path points power: exponent is {self.exponent!r}: it must be at least 1")

    def fractions(self, steps: int) -> Fractions:
        """Steps that grow with α."""
        found = tuple((step / steps) ** self.exponent for step in range(steps + 1))
        if any(lower == upper for lower, upper in pairwise(found)):
            raise AttributionError(
                f"path points power: with {steps} steps and the exponent {self.exponent:g} the first points are all 0: "
                "lower the exponent"
            )
        return found


@POINTS.register("given")
@dataclass(frozen=True)
class GivenPoints(PathPoints):
    """Given points.

    Args:
        values: α of every point, ascending from 0 to 1.
    """

    values: Sequence[int | float]

    def __post_init__(self) -> None:
        values = self.values
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise AttributionError(f"path points: {values!r}: give at least the two numbers 0 and 1")
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise AttributionError(f"path points: {list(values)!r} are not all numbers")
        if values[0] != 0 or values[-1] != 1 or not all(lower < upper for lower, upper in pairwise(values)):
            raise AttributionError(f"path points: {list(values)!r}: they must ascend from 0 to 1")
        object.__setattr__(self, "values", tuple(map(float, values)))

    def fractions(self, steps: int) -> Fractions:
        """The points, which must be as many as the steps ask for."""
        if steps != len(self.values) - 1:
            raise AttributionError(
                f"path points: {len(self.values)} points are given, but steps is {steps}: leave steps out, or give "
                f"{steps + 1} points"
            )
        return tuple(self.values)


@POINTS.register("learned")
@dataclass(frozen=True)
class LearnedPoints(PathPoints):
    """Points at which contributions add up best for this model, found once on a probe of images.

    See :func:`codec_dist.attribution.choose_path`.
    """

    def fractions(self, steps: int) -> Fractions:
        """Never: they must be chosen first."""
        raise AttributionError("path points are `learned`: choose them with choose_path(attributor, images) before")


def as_points(value: object) -> PathPoints:
    """Path points from what a user or a config gives: a name, a list of α, {name, options}, or path points.

    Raises:
        AttributionError: it is none of these, or the registry refuses it.
    """
    if isinstance(value, PathPoints):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return GivenPoints(value)
    if (built := POINTS.build_choice(value)) is not None:
        return built
    raise AttributionError(
        f"bad path points {value!r}: give {', '.join(POINTS)}, a list of fractions from 0 to 1, or "
        "{name: ..., options: {...}}"
    )
