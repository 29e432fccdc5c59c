"""What is to be tried: channel rankings, numbers of channels, classes; expanded to conditions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec_dist.interventions.errors import InterventionError
from codec_dist.utils import derive_seed

INTACT, ABLATE, PRESERVE = "intact", "ablate", "preserve"
KINDS = (ABLATE, PRESERVE)
RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to change a layer, and the classes whose accuracy it is to show.

    Conditions of one ranking share its ``order``, so that even the plan of a thousand classes pickles small.
    """

    ranking: str
    """Name of the ranking, e.g. ``contribution-positive`` or ``random``."""
    draw: int
    """Number of the random draw; 0 for other rankings."""
    target: int | None
    """Class that the ranking aims at; None for the unchanged model."""
    kind: str
    """``ablate`` (the chosen channels become zero), ``preserve`` (all others do) or ``intact``."""
    count: int
    """How many channels are chosen: the first so many of ``order``."""
    order: Int[np.ndarray, "channels"]
    """All channels of the layer, best first."""
    classes: tuple[int, ...]
    """Classes whose images are needed, ascending."""

    @property
    def channels(self) -> Int[np.ndarray, "chosen"]:
        """The chosen channels, best first."""
        return self.order[: self.count]

    def keep(self) -> Bool[np.ndarray, "channels"]:
        """Which channels stay as they are."""
        keep = np.full(len(self.order), self.kind != PRESERVE)
        keep[self.channels] = self.kind != ABLATE
        return keep


@dataclass(frozen=True, eq=False)
class Experiment:
    """The causal tests of one layer, from which :func:`layer_results` are computed once the counts are there."""

    layer: str
    """Layer key."""
    channels: int
    """Number of the layer's channels."""
    counts: Mapping[float | int, int]
    """Percentage → number of channels, see :func:`channel_counts`."""
    off_targets: Mapping[int, tuple[int, ...]]
    """Target class → its off-target classes, see :func:`choose_off_targets`."""
    rankings: Mapping[str, Mapping[int, Int[np.ndarray, "channels"]]]
    """Ranking → target class → all channels, best first; without the random rankings."""
    random_draws: int
    """Random rankings of each target class."""
    seed: int
    """Seed of the random rankings."""

    @property
    def classes(self) -> tuple[int, ...]:
        """All classes whose images are needed, ascending."""
        return tuple(sorted({*self.off_targets, *(other for others in self.off_targets.values() for other in others)}))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions; the first is ``intact`` and needs all classes.

        Expanded at each access: random rankings are a function of the seed, so that an experiment of any
        number of them is small to send.
        """
        identity = np.arange(self.channels, dtype=np.int32)
        conditions = [Condition(INTACT, 0, None, INTACT, 0, identity, self.classes)]
        numbers = sorted(set(self.counts.values()))
        for ranking, draw, target, order in self._orders():
            classes = tuple(sorted({target, *self.off_targets[target]}))
            conditions += [
                Condition(ranking, draw, target, kind, number, order, classes) for kind in KINDS for number in numbers
            ]
        return tuple(conditions)

    def _orders(self) -> Iterator[tuple[str, int, int, Int[np.ndarray, "channels"]]]:
        for ranking, orders in self.rankings.items():
            for target, order in orders.items():
                yield ranking, 0, target, order
        for target in self.off_targets:
            for draw in range(self.random_draws):
                yield RANDOM, draw, target, random_order(self.channels, self.layer, target, draw, self.seed)


def channel_counts(percentages: Sequence[float | int], channels: int) -> dict[float | int, int]:
    """How many of ``channels`` each percentage means: floor(p·C/100), at least 1 (docs/method.md §6).

    Percentages are read as the decimals that they are written as, so 2.3 % of 1,000 is 23. Several
    percentages may give one number: it is run once and reported for each.

    Raises:
        InterventionError: no percentage, one outside (0, 100], or no channel.
    """
    if channels < 1 or not percentages:
        raise InterventionError(
            f"{len(percentages)} percentages of {channels} channels: at least one of each is needed"
        )
    for percentage in percentages:
        if not 0 < percentage <= 100:
            raise InterventionError(f"{percentage} % of the channels: choose percentages above 0 and up to 100")
    return {p: max(1, math.floor(Fraction(str(p)) * channels / 100)) for p in sorted(set(percentages))}


def choose_off_targets(
    classes: Sequence[int], count: int, seed: int, targets: Sequence[int] | None = None
) -> dict[int, tuple[int, ...]]:
    """Up to ``count`` random other classes for each target class: never itself, none twice.

    Every pair of classes has its own random place in the order of choice, so that a class that is missing
    changes no choice but those that it was part of.

    Args:
        classes: classes to choose from.
        count: off-target classes per target class.
        seed: seed of the choice.
        targets: target classes; default: all ``classes``.

    Raises:
        InterventionError: fewer than two classes, or ``count`` below 1.
    """
    known = sorted(set(classes))
    if len(known) < 2 or count < 1:
        raise InterventionError(
            f"{count} off-target classes out of {len(known)}: two classes and one choice are needed"
        )
    selected = {}
    for target in known if targets is None else sorted(set(targets)):
        others = [other for other in known if other != target]
        places = {other: derive_seed(seed, "off-target", target, other) for other in others}
        selected[target] = tuple(sorted(sorted(others, key=places.__getitem__)[:count]))
    return selected


def choose_targets(classes: Sequence[int], count: int | None, seed: int) -> tuple[int, ...]:
    """At most ``count`` random classes (None: all), ascending; a missing class changes no choice but its own."""
    known = sorted(set(classes))
    return tuple(sorted(sorted(known, key=lambda label: derive_seed(seed, "target", label))[:count]))


def rank_channels(mode: Float[Tensor, "channels"] | Float[np.ndarray, "channels"]) -> Int[np.ndarray, "channels"]:
    """Channels by signed value of a mode's dictionary row, highest first; equal ones by number (docs/method.md §6).

    Raises:
        InterventionError: a value is not finite.
    """
    values = np.asarray(mode.detach().cpu() if isinstance(mode, torch.Tensor) else mode, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InterventionError(f"the mode's value of channel {int(np.argmin(np.isfinite(values)))} is not finite")
    return np.argsort(-values, kind="stable").astype(np.int32)


def random_order(channels: int, layer: str, target: int, draw: int, seed: int) -> Int[np.ndarray, "channels"]:
    """The channels of a layer in the random order of one target class and draw: a pure function of the arguments."""
    generator = np.random.default_rng(derive_seed(seed, "random channels", layer, target, draw))
    return generator.permutation(channels).astype(np.int32)


def plan_experiment(
    layer: str,
    channels: int,
    modes: Mapping[str, Mapping[int, Any]],
    *,
    off_targets: Mapping[int, Sequence[int]],
    percentages: Sequence[float | int],
    random_draws: int = 20,
    seed: int = 0,
) -> Experiment:
    """Plan the causal tests of one layer (docs/method.md §6).

    Args:
        layer: layer key.
        channels: number of the layer's channels.
        modes: ranking name → {class: dictionary row ``[channels]`` of the class's top mode, chosen on the
            select part}. A class without a mode is no subject of that ranking.
        off_targets: target class → off-target classes, as :func:`choose_off_targets` makes them. Every
            target class gets random rankings of its own.
        percentages: percentages of the channels that are ablated or preserved.
        random_draws: random rankings of each target class, the control; 0 for none.
        seed: seed of the random rankings.

    Raises:
        InterventionError: a row of another length, a ranking called ``random``, a class among its own
            off-targets, or a percentage out of range.
    """
    counts = channel_counts(percentages, channels)
    targets = {int(target): tuple(map(int, others)) for target, others in off_targets.items()}
    for target, others in targets.items():
        if target in others or not others or len(set(others)) < len(others):
            raise InterventionError(
                f"the off-target classes of class {target} are {others}: name other classes, each once"
            )
    rankings = {ranking: _rank_modes(layer, channels, ranking, rows, targets) for ranking, rows in modes.items()}
    return Experiment(layer, channels, counts, targets, rankings, random_draws, seed)


def _rank_modes(
    layer: str, channels: int, ranking: str, rows: Mapping[int, Any], targets: Mapping[int, tuple[int, ...]]
) -> dict[int, Int[np.ndarray, "channels"]]:
    if ranking in (RANDOM, INTACT):
        raise InterventionError(f"a ranking of {layer} is called {ranking!r}, which has a meaning: rename it")
    for target, row in rows.items():
        if tuple(row.shape) != (channels,):
            raise InterventionError(
                f"the mode of class {target} for {layer} has shape {tuple(row.shape)}, not ({channels},)"
            )
        if target not in targets:
            raise InterventionError(f"class {target} of ranking {ranking!r} has no off-target classes: name some")
    return {int(target): rank_channels(row) for target, row in rows.items()}
