"""The SAEs that a config asks for: what each is called, which already exist, and the task that every rank gets."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError

from codec_dist.config import SaeGroup, TrackingSection, TrainingSettings
from codec_dist.sae import ARCHITECTURES, FittedAutoencoder, SaeError, build, has_weights
from codec_dist.store import ContributionStore
from codec_dist.training.errors import TrainingError
from codec_dist.training.rows import STREAMED_WINDOW_BYTES
from codec_dist.utils import derive_seed, escape_name, hash_json, suggestion

FORMAT = 1
HASH_DIGITS = 12
FIRST_SETTINGS = ("epochs", "batch_size", "learning_rate", "schedule", "patience")

PREFIX = "training."


@dataclass(frozen=True, eq=False)
class SaeJob:
    """One SAE to train: everything that its weights depend on, except the rows themselves."""

    layer: str
    quantity: str
    channels: int
    """Numbers in a row: those of the layer, or twice as many where both signs lie side by side."""
    architecture: str
    options: Mapping[str, Any]
    settings: TrainingSettings
    seed: int
    """The run's, plus that of the group."""
    digest: str
    """Hash of architecture, settings, layer, quantity, the store's identity and the split; not of the seed."""
    grid_values: Mapping[str, Any] = field(default_factory=dict)
    """The grid's values by name, and the seed if the group has several: what tells it from its siblings."""

    @property
    def key(self) -> tuple[str, str]:
        """Layer and quantity: the rows that the SAE decomposes."""
        return self.layer, self.quantity

    @property
    def identity(self) -> str:
        """Digest and seed, which no two SAEs share; the name of its folder."""
        return f"{self.digest[:HASH_DIGITS]}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the SAE lives, relative to the run's ``sae`` folder."""
        return self.rows_folder / self.identity

    @property
    def rows_folder(self) -> Path:
        """The folder of all SAEs of its layer and quantity, relative to the run's ``sae`` folder."""
        return Path(escape_name(self.layer), escape_name(self.quantity))

    @property
    def label(self) -> str:
        """Its name in logs."""
        values = ",".join(f"{name}={value}" for name, value in self.grid_values.items())
        return "/".join([self.layer, self.quantity, self.architecture, *filter(None, [values])])

    @property
    def fitted(self) -> bool:
        """Whether the architecture is fitted in one pass, not trained by gradient."""
        kind = ARCHITECTURES.factory(self.architecture)
        return isinstance(kind, type) and issubclass(kind, FittedAutoencoder)

    @property
    def epochs(self) -> int:
        """Passes over the rows of the fit part, at most."""
        return 1 if self.fitted else self.settings.epochs

    @property
    def parameters(self) -> int:
        """Numbers that are trained, as many as the dictionary and what encodes hold."""
        with torch.device("meta"):
            sae = build(self.architecture, self.options, self.channels)
        return sum(parameter.numel() for parameter in sae.parameters())

    @property
    def work(self) -> int:
        """Arithmetic of the training, in numbers that are proportional to it."""
        return self.epochs * (self.channels**2 if self.fitted else self.parameters)

    def derived_seed(self, *purpose: int | str) -> int:
        """A seed for one purpose that no other SAE or purpose shares."""
        return derive_seed(self.seed, self.digest, *purpose)


def plan_jobs(store: ContributionStore, groups: Sequence[SaeGroup], split_hash: str, seed: int) -> list[SaeJob]:
    """The SAEs of all groups, in the order of groups, layers, quantities and grids; none twice.

    Raises:
        TrainingError: a layer or quantity (or glob over them) that the store does not hold, or a group that
            asks for no SAE.
    """
    jobs: dict[str, SaeJob] = {}
    for group, layer, quantity in _requested(list(store.layers), list(store.quantities), groups):
        for point in expand_grid(group):
            job = _job(store, group, point, layer, quantity, split_hash, seed)
            jobs.setdefault(f"{job.digest} {job.seed}", job)
    return list(jobs.values())


def check_training(
    layers: Mapping[str, int], quantities: Sequence[str], groups: Sequence[SaeGroup], spread: str = "rows"
) -> dict[str, list[str]]:
    """Refuse what no training over a store of these layers and quantities could do, before anything starts.

    Builds every kind of SAE once (without memory), so that a wrong option is known, too.

    Args:
        layers: layer key → channels, of the store.
        quantities: names of the stored quantities.
        groups: what to train.
        spread: ``sae.spread``.

    Returns:
        Layer key → quantities that get an SAE.

    Raises:
        TrainingError: a layer or quantity (or glob over them) that is not stored, a group that asks for no SAE, a
            grid of unknown names, or settings that exclude each other.
        SaeError: an unknown architecture, or options that it refuses for this number of channels.
    """
    found: dict[str, list[str]] = {}
    built: set[str] = set()
    for group, layer, quantity in _requested(list(layers), quantities, groups):
        channels = _row_length(layers[layer], quantity)
        for point in expand_grid(group):
            if spread == "saes" and point.settings.divide:
                raise TrainingError(
                    "training.divide spreads a dictionary over all ranks, but with sae.spread saes each rank trains "
                    "by itself: use sae.spread rows, or leave divide out"
                )
            kind = hash_json([point.architecture, point.options, channels])
            if kind not in built:
                _check_options(layer, channels, point)
                built.add(kind)
        if quantity not in found.setdefault(layer, []):
            found[layer].append(quantity)
    return found


def _requested(
    layers: Sequence[str], quantities: Sequence[str], groups: Sequence[SaeGroup]
) -> Iterator[tuple[SaeGroup, str, str]]:
    """What groups ask for, as (group, layer, quantity)."""
    for group in groups:
        names = _matching("layers", group.layers, layers)
        for layer, quantity in product(
            names, _matching("quantities", group.quantities, quantities, _derived_quantities(quantities))
        ):
            yield group, layer, quantity


def _row_length(channels: int, quantity: str) -> int:
    """Numbers in a row: one per channel, or two where both signs lie side by side."""
    return channels * (2 if quantity.endswith("-both") else 1)


@dataclass(frozen=True)
class GridPoint:
    """One combination of a grid's values, whatever the layer."""

    architecture: str
    options: dict[str, JsonValue]
    """All options that are given, by the group or by the grid."""
    settings: TrainingSettings
    seed: int
    """To be added to the run's seed."""
    grid_values: dict[str, JsonValue]
    """The grid's values alone, by their names in the grid."""


def _check_options(layer: str, channels: int, point: GridPoint) -> None:
    try:
        with torch.device("meta"):
            build(point.architecture, point.options, channels)
    except SaeError as error:
        raise SaeError(f"{layer} ({channels} channels): {error}") from error


def is_finished(folder: Path) -> bool:
    """Whether an SAE was trained to its end (the metrics are written last) and its weights are there, whole."""
    return (folder / "metrics.json").is_file() and has_weights(folder)


def _job(
    store: ContributionStore, group: SaeGroup, point: GridPoint, layer: str, quantity: str, split_hash: str, seed: int
) -> SaeJob:
    requested = {
        "format": FORMAT,
        "architecture": {"name": point.architecture, "options": point.options},
        "training": _in_digest(point.settings),
        "layer": layer,
        "quantity": quantity,
        "data": store.identity_hash,
        "rows": {marker.shard: marker.rows for marker in store.markers.values()},
        "split": split_hash,
    }
    return SaeJob(
        layer=layer,
        quantity=quantity,
        channels=_row_length(store.layers[layer], quantity),
        architecture=point.architecture,
        options=point.options,
        settings=point.settings,
        seed=seed + point.seed,
        digest=hash_json(requested),
        grid_values=point.grid_values | ({"seed": seed + point.seed} if len(group.seeds) > 1 else {}),
    )


def _in_digest(settings: TrainingSettings) -> dict[str, Any]:
    """Without what changes results by rounding at most, as the number of ranks does.

    Settings that came later are left out where they are off, so that SAEs from before keep their names.
    """
    fields = TrainingSettings.model_fields
    values = settings.model_dump(mode="json", exclude={"divide"})
    return {name: value for name, value in values.items() if name in FIRST_SETTINGS or value != fields[name].default}


def _derived_quantities(stored: Sequence[str]) -> list[str]:
    """The quantities that derive from both signs, where a store holds both; only exact names ask for them."""
    kinds = [name.removesuffix("-positive") for name in stored if name.endswith("-positive")]
    both = [kind for kind in kinds if f"{kind}-negative" in stored]
    return [f"{kind}-{sign}" for sign in ("net", "both") for kind in both]


def _matching(section: str, patterns: Sequence[str], stored: Sequence[str], derived: Sequence[str] = ()) -> list[str]:
    if not patterns:
        raise TrainingError(f"sae.groups.{section} is empty, so there is nothing to train")
    names: list[str] = []
    for pattern in patterns:
        # An exact name first, because names may hold the brackets that globs use.
        known = [*stored, *derived]
        found = [pattern] if pattern in known else [name for name in stored if fnmatchcase(name, pattern)]
        if not found:
            raise TrainingError(f"sae.groups.{section}: the store holds no {pattern!r}; {suggestion(pattern, known)}")
        names += found
    return list(dict.fromkeys(names))


# ---- The grid of a group: architectures with their options, settings and seeds, one by one


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
        grid_values = dict(zip(group.grid, values, strict=True))
        options = {name: value for name, value in grid_values.items() if not name.startswith(PREFIX)}
        options = dict(group.architecture.options) | options
        settings = _grid_settings(group.training, dict(_of_training(grid_values)))
        points += [
            GridPoint(group.architecture.name, options, settings, seed, grid_values)
            for seed in dict.fromkeys(group.seeds)
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


def _of_training(grid_values: dict[str, JsonValue]) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(PREFIX), value) for name, value in grid_values.items() if name.startswith(PREFIX))


def _grid_settings(base: TrainingSettings, changes: dict[str, Any]) -> TrainingSettings:
    try:
        return TrainingSettings.model_validate(base.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise TrainingError(f"sae.groups.grid: {PREFIX}{name}: {first['msg']} (found {first['input']!r})") from error


# ---- The task, the same on every rank


@dataclass(frozen=True)
class TrainingTask:
    """The SAEs to train and where things are; the same on every rank."""

    directory: Path
    """The run; SAEs go to ``directory/sae``."""
    store_path: str | Path
    """Folder or URL of the store."""
    split_path: Path
    jobs: tuple[SaeJob, ...]
    """All SAEs that are asked for, finished ones among them."""
    name: str
    """Name of the run, under which the tracker groups."""
    seed: int
    evaluations: int
    checkpoints: int
    tracking: TrackingSection
    correlation_threshold: float = 0.2
    dtype: str = "float32"
    """Type of rows and weights."""
    threads: int = 1
    """CPU threads of each rank."""
    spread: bool = False
    """Whether each rank trains whole layers and quantities by itself, instead of shares of every batch."""
    bytes_for_rows: int | None = None
    """Memory that each rank may fill with rows; None: measured."""
    window_bytes: int = STREAMED_WINDOW_BYTES
    """Memory of one window of rows that do not fit."""

    def folder(self, job: SaeJob) -> Path:
        """Where an SAE is saved."""
        return self.directory / "sae" / job.folder

    @property
    def scratch(self) -> Path:
        """Files that live only while the training runs."""
        return self.directory / "sae" / ".train"
