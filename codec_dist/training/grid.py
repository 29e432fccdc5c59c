"""What the grid of a group stands for: architectures with their options, settings and seeds, one by one."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import JsonValue, ValidationError

from codec_dist.config import SaeGroup, TrainingSettings
from codec_dist.sae import ARCHITECTURES
from codec_dist.training.errors import TrainingError
from codec_dist.utils import suggestion

PREFIX = "training."


@dataclass(frozen=True)
class GridPoint:
    """One combination of a grid's values, whatever the layer."""

    architecture: str
    options: dict[str, JsonValue]
    """All options that are given, by the group or by the grid."""
    settings: TrainingSettings
    seed: int
    """To be added to the run's seed."""
    chosen: dict[str, JsonValue]
    """The grid's values alone, by their names in the grid."""


def expand_grid(group: SaeGroup) -> list[GridPoint]:
    """All points of a group's grid, the last name and then the seeds running fastest.

    Raises:
        TrainingError: a name that is no option and no setting (the nearest is given), a name without values,
            or a setting out of range.
        SaeError: an unknown architecture.
    """
    _check_names(group)
    points = []
    for values in product(*group.grid.values()):
        chosen = dict(zip(group.grid, values, strict=True))
        options = {name: value for name, value in chosen.items() if not name.startswith(PREFIX)}
        options = dict(group.architecture.options) | options
        settings = _settings(group.training, dict(_of_training(chosen)))
        points += [
            GridPoint(group.architecture.name, options, settings, seed, chosen) for seed in dict.fromkeys(group.seeds)
        ]
    return points


def _check_names(group: SaeGroup) -> None:
    accepted = inspect.signature(ARCHITECTURES.factory(group.architecture.name)).parameters
    known = [name for name in accepted if name != "channels"]
    known += [f"{PREFIX}{name}" for name in TrainingSettings.model_fields]
    for name, values in group.grid.items():
        if name not in known:
            raise TrainingError(
                f"sae.groups.grid: {group.architecture.name} has no option {name!r}; {suggestion(name, known)}"
            )
        if not values:
            raise TrainingError(f"sae.groups.grid: {name} has no values, so there is nothing to train")
    if not group.seeds:
        raise TrainingError("sae.groups.seeds is empty, so there is nothing to train")


def _of_training(chosen: dict[str, JsonValue]) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(PREFIX), value) for name, value in chosen.items() if name.startswith(PREFIX))


def _settings(base: TrainingSettings, changes: dict[str, Any]) -> TrainingSettings:
    try:
        return TrainingSettings.model_validate(base.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise TrainingError(f"sae.groups.grid: {PREFIX}{name}: {first['msg']} (found {first['input']!r})") from error
