"""The path points of a store: learned once, on images of the fit part, where the actors will compute."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from codec_dist.attribution import (
    Attributor,
    DataStatistics,
    IntegratedGradients,
    IntervalErrors,
    NotFiniteError,
    PathChoice,
    choose_from,
    choose_path,
    dense_path,
)
from codec_dist.cluster_runtime import map_fold
from codec_dist.extraction.batches import Batch, Dropped, make_batches
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan, build_attributor, needs_labels, open_method, pin_numerics
from codec_dist.models import LoadedModel, load_model
from codec_dist.shards import ShardInfo, configured_index, configured_split, read_shard
from codec_dist.utils import Progress, derive_seed

# Images on which points are chosen, and shards that they are read from: of those there may be thousands.
PROBE_IMAGES, PROBE_SHARDS = 48, 8


@dataclass(frozen=True)
class ProbePart:
    """Some images of one shard."""

    shard: ShardInfo
    keys: frozenset[str]


def choose_probe(plan: Plan, shards: Sequence[ShardInfo]) -> tuple[ProbePart, ...]:
    """Random images of the fit part, from a few random shards; the same ones for the same config and data.

    Raises:
        ExtractionError: the fit part is empty.
    """
    config = plan.config
    table = configured_split(config, configured_index(config).samples())
    table = table.filter(pc.equal(table["part"], "fit"))
    keys = defaultdict(list)
    for name, key in zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True):
        keys[name].append(key)
    available = [shard for shard in shards if keys[shard.name]]
    if not available:
        raise ExtractionError(f"no image of {plan.location} is of the fit part: check data.split")
    random = np.random.default_rng(derive_seed(config.run.seed, "path points"))
    selected = [available[place] for place in sorted(random.permutation(len(available))[:PROBE_SHARDS])]
    each = -(-PROBE_IMAGES // len(selected))
    return tuple(
        ProbePart(shard, frozenset(random.permutation(sorted(keys[shard.name]))[:each].tolist())) for shard in selected
    )


@dataclass
class Measured:
    """Interval errors of some images; None where none could be used, and then why."""

    errors: IntervalErrors | None
    reason: str = ""

    def merge(self, other: "Measured") -> None:
        """Take in those of other images."""
        found = [each for each in (self.errors, other.errors) if each is not None]
        self.errors = IntervalErrors.join(found) if found else None
        self.reason = self.reason or other.reason


@dataclass(frozen=True)
class MeasureIntervals:
    """Measures a part of the probe; plain, so that it travels to a worker."""

    plan: Plan
    fractions: tuple[float, ...]
    device: str

    def __call__(self, part: ProbePart) -> Measured:
        """Errors of the intervals of a dense path, of the images that can be used."""
        pin_numerics(self.plan.config, torch.device(self.device))
        loaded, attributor = _engine(self.plan, self.device)
        batch, reason = _read(self.plan, loaded, part, needs_labels(attributor))
        if batch is None:
            return Measured(None, reason)
        errors = attributor.interval_errors(batch.images, self.fractions, batch.labels)
        bad = set(errors.not_finite)
        kept = [place for place in range(len(batch)) if place not in bad]
        if not kept:
            return Measured(None, f"{batch.keys[0]}: its path is not finite (NaN or infinity)")
        return Measured(errors.of_images(torch.tensor(kept)))


@dataclass
class Chosen:
    """What was chosen, with nothing to merge: it is chosen once."""

    choice: PathChoice

    def merge(self, other: "Chosen") -> None:
        """Never called: there is one."""


@dataclass(frozen=True)
class TrySteps:
    """Tries more and more steps of points that are not learned; plain, so that it travels to a worker."""

    plan: Plan
    device: str

    def __call__(self, probe: Sequence[ProbePart]) -> Chosen:
        """The fewest steps that are complete enough on the probe."""
        pin_numerics(self.plan.config, torch.device(self.device))
        loaded, attributor = _engine(self.plan, self.device)
        read = [_read(self.plan, loaded, part, needs_labels(attributor)) for part in probe]
        batches = [batch for batch, _ in read if batch is not None]
        if not batches:
            raise ExtractionError(f"no image of {self.plan.location} can be used to choose steps: {read[0][1]}")
        images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
        while True:
            try:
                return Chosen(choose_path(attributor, images, labels))
            except NotFiniteError as error:
                # Such samples are dropped by the extraction, too.
                kept = [place for place in range(len(images)) if place not in set(error.samples)]
                if not kept:
                    raise
                images, labels = images[kept], labels[kept]


def resolve_points(plan: Plan, shards: Sequence[ShardInfo], device: str) -> tuple[Plan, dict[str, Any]]:
    """The plan with its points, and what is to be noted in a store that is made; needs an open Ray session.

    Args:
        plan: with optimisations for ``device``; one that has points, as those of a store, keeps them.
        shards: all shards of the data.
        device: ``cuda`` or ``cpu``.

    Raises:
        ExtractionError: no image of the fit part can be used.
        AttributionError: no number of steps is complete enough.
    """
    method = open_method(plan.config)
    if method is None or plan.fractions is not None:
        return plan, {}
    probe = choose_probe(plan, shards)
    choice = _learn(plan, method, probe, device) if method.learns_points else _try(plan, probe, device)
    sys.stderr.write(f"extract: {describe(choice)}\n")
    found = {
        "probe_images": choice.images,
        "probe_layer": choice.layer,
        "probe_residual": choice.residual,
        "uniform_residual": choice.uniform,
        "residuals_by_steps": [[steps, residual] for steps, residual in choice.measured],
    }
    return replace(plan, fractions=choice.fractions), {"path": found}


def describe(choice: PathChoice) -> str:
    """One line on what was chosen."""
    said = f"{choice.steps} steps chosen" if choice.measured else f"{choice.steps + 1} path points learned"
    aim = f", below {choice.tolerance:g}" if choice.tolerance is not None else ""
    uniform = f" (uniform points: {choice.uniform:.1%})" if choice.uniform is not None else ""
    return (
        f"{said} on {choice.images} images: contributions of layer {choice.layer} miss a median of "
        f"{choice.residual:.1%} of what they explain{aim}{uniform}"
    )


def _learn(plan: Plan, method: IntegratedGradients, probe: Sequence[ProbePart], device: str) -> PathChoice:
    fractions = dense_path(None if method.steps == "auto" else int(method.steps))
    with Progress("path points", len(probe), "shards") as progress:
        task = MeasureIntervals(plan, fractions, device)
        measured = map_fold(probe, task, progress=progress, **_place(plan, device))
    if measured.errors is None:
        raise ExtractionError(f"no image of {plan.location} can be used to learn path points: {measured.reason}")
    return choose_from(measured.errors, method)


def _try(plan: Plan, probe: Sequence[ProbePart], device: str) -> PathChoice:
    return map_fold([probe], TrySteps(plan, device), **_place(plan, device)).choice


def _place(plan: Plan, device: str) -> dict[str, Any]:
    """What tasks take of the cluster: each as much as an actor, and no more of them at once than actors."""
    cluster = plan.config.cluster
    return {
        "num_cpus": cluster.cpus_per_actor,
        "num_gpus": 1 if device == "cuda" else 0,
        "at_once": cluster.actors,
    }


def _engine(plan: Plan, device: str) -> tuple[LoadedModel, Attributor]:
    """The model on the device, and the engine with what the config leaves open."""
    loaded = load_model(plan.config.model, seed=plan.config.run.seed)
    loaded.module.to(device)
    statistics = None if plan.statistics is None else DataStatistics.load(plan.statistics)
    attributor = build_attributor(
        plan.config,
        loaded,
        microbatch=plan.microbatch,
        statistics=statistics,
        optimizations=plan.optimizations,
        keep_open=True,
    )
    return loaded, attributor


def _read(plan: Plan, loaded: LoadedModel, part: ProbePart, labelled: bool) -> tuple[Batch | None, str]:
    """The images of a part that can be used, or why none can."""
    data, dropped = plan.config.data, list[Dropped]()
    samples = read_shard(
        plan.location,
        part.shard,
        image_fields=data.image_fields,
        label_field=data.label_field,
        threads=data.decode_threads,
        classes=loaded.classes,
        keys=part.keys,
    )
    batch = next(make_batches(samples, loaded.preprocessing, len(part.keys), dropped.append, labelled), None)
    return batch, f"{dropped[0].key}: {dropped[0].reason}" if dropped else ""
