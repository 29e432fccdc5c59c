"""What is to be done, decided once by the coordinator before any actor starts."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from codec_dist.attribution import (
    METHODS,
    TARGETS,
    AttributionError,
    AttributionResult,
    Attributor,
    DataStatistics,
    GivenPoints,
    IntegratedGradients,
    NotFiniteError,
    Optimizations,
)
from codec_dist.config import Config
from codec_dist.extraction.agreement import NOTHING_EXPECTED, Expectation
from codec_dist.extraction.batches import Dropped, make_batches
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.identity import needs_statistics, store_identity
from codec_dist.extraction.sizing import LARGEST_MICROBATCH, ActorNeeds, measure_needs
from codec_dist.models import LoadedModel, load_model
from codec_dist.shards import Decoded, ShardIndex, ShardInfo, configured_index, read_shard
from codec_dist.store import ContributionStore, create_store, store_exists

# Beside the arrays: tables of samples, markers, files that are being written.
SPARE_BYTES = 64 * 1024 * 1024
SPARE_FACTOR = 1.02

# The path of a trial, where points are chosen later.
TRIAL_PATH = (0.0, 1.0)

# Samples that may turn out bad before the model is tried on one.
TRIED_SAMPLES = 100


@dataclass(frozen=True)
class Plan:
    """What every actor gets; small and plain, so that it travels as a value."""

    config: Config
    location: str
    """Folder or URL of the shards."""
    store: str
    """Folder or URL of the store."""
    model_fingerprint: str
    layers: Mapping[str, int]
    """Layer key → channels."""
    quantities: tuple[str, ...]
    complete_layers: tuple[str, ...]
    """Layers whose samples have a completeness residual."""
    targets: tuple[str, ...]
    identity: Mapping[str, Any]
    """All that the stored numbers depend on."""
    microbatch: int
    """Images that pass through the model at once; where the config leaves that to measuring, the most that may."""
    needs: Mapping[str, ActorNeeds]
    """What an actor takes of its node's memory on a CPU (``cpu``) and on a GPU (``cuda``)."""
    optimizations: Optimizations = field(default_factory=Optimizations)
    """What makes the model faster and leaves its numbers as they are, found out by the engine's self-check."""
    fractions: tuple[float, ...] | None = None
    """Points of the path chosen by measuring, where the config leaves them to that."""
    statistics: Path | None = None
    """What was measured of the data set, where the target or the baseline needs that."""
    expected: Expectation = NOTHING_EXPECTED
    """What is known of labels and predictions."""

    @property
    def refines(self) -> bool:
        """Whether each image's path has steps of its own."""
        method = METHODS.build(self.config.attribution.method.name, self.config.attribution.method.options)
        return isinstance(method, IntegratedGradients) and method.adaptive is not None

    @property
    def store_exists(self) -> bool:
        """Whether the store was made already."""
        return store_exists(self.store)


def make_plan(config: Config) -> tuple[Plan, tuple[ShardInfo, ...]]:
    """Check all that can be checked without an actor, also that a store which exists is of the same identity.

    Returns:
        The plan, and the shards in the order of their numbers in the store.

    Raises:
        ShardError: shards are missing, cut short or not as indexed.
        ModelError: a model, weights or a layer that do not exist or do not fit.
        AttributionError: a method or target that this model cannot have.
        StoreError: the store at the run's place was made with other settings.
        ExtractionError: no image can be used, more classes are named than the model has outputs, or too many labels
            are beyond the model's outputs, or missing where the target needs them.
    """
    index = configured_index(config)
    loaded = load_model(config.model, seed=config.run.seed)
    # Actors get what followed from the weights as settings.
    config = config.model_copy(update={"model": loaded.section})
    attributor = build_attributor(config, loaded)
    _check_labels(index, loaded.classes, needs_labels(attributor), config.data.max_bad_fraction)
    _check_class_names(index, loaded.classes)
    trial = _try_one(config, index, loaded, attributor)
    first = next(iter(trial.values()))
    plan = Plan(
        config=config,
        location=index.location,
        store=config.store_location,
        model_fingerprint=loaded.fingerprint,
        layers=attributor.channels,
        quantities=tuple(first.quantities()),
        complete_layers=tuple(layer for layer, result in trial.items() if result.completeness is not None),
        targets=tuple(target.name for target in attributor.targets),
        identity=store_identity(config, index, loaded, attributor),
        optimizations=attributor.optimizations,
        microbatch=attributor.microbatch or LARGEST_MICROBATCH,
        needs=measure_needs(config, index.shards, loaded, attributor, _most_steps(config)),
        expected=_expectation(config, index, loaded),
    )
    if plan.store_exists:
        plan = with_stored_points(plan)
        # Another identity is refused here, before Ray starts.
        open_store(plan, index.shards)
    return plan, index.shards


def with_stored_points(plan: Plan) -> Plan:
    """The plan with the path points of the store that is there, where the config leaves them to measuring.

    A store without any is left to the comparison of identities.

    Raises:
        ExtractionError: the store's points cannot be those of the config.
    """
    method = open_method(plan.config)
    attribution = ContributionStore(plan.store).identity.get("attribution")
    stored: Any = attribution.get("path_points") if isinstance(attribution, Mapping) else None
    if method is None or stored is None:
        return plan
    try:
        points = tuple(GivenPoints(stored).values)
    except AttributionError as error:
        raise no_points(plan.store, stored) from error
    if isinstance(method.steps, int) and len(points) != method.steps + 1:
        raise no_points(plan.store, stored)
    return replace(plan, fractions=points)


def no_points(store: str, stored: object) -> ExtractionError:
    """The error where a store does not say what it must."""
    return ExtractionError(
        f"the store {store} does not say at which points of the path it was made ({stored!r}): restore it from a copy, "
        "or remove it"
    )


def _expectation(config: Config, index: ShardIndex, loaded: LoadedModel) -> Expectation:
    classes = len(index.classes) if index.classes else None
    if classes is None and config.data.limit is None:
        classes = pc.count_distinct(index.samples()["label"], mode="only_valid").as_py() or None
    # The weights of a function of the user's own are whatever it gives.
    random = config.model.weights_kind == "none" and not config.model.spec.startswith("module:")
    return Expectation(loaded.classes, classes, random)


def open_store(plan: Plan, shards: Sequence[ShardInfo], settings: Mapping[str, Any] = {}) -> Mapping[str, Any]:
    """Make the plan's store, or find it to be of the same identity.

    Args:
        plan: what is to be stored.
        shards: in the order of their numbers.
        settings: what was chosen by measuring, such as the device; a store that exists keeps its own.

    Returns:
        The settings of the store.

    Raises:
        StoreError: the store at the run's place was made with other settings.
    """
    create_store(
        plan.store,
        identity=_whole_identity(plan),
        layers=plan.layers,
        targets=plan.targets,
        quantities=plan.quantities,
        shards=[(shard.name, shard.samples) for shard in shards],
        dtype=plan.config.attribution.dtype,
        settings=settings,
        compression=plan.config.store.compression,
        sharding=plan.config.store.sharding,
    )
    return ContributionStore(plan.store).settings


def _whole_identity(plan: Plan) -> dict[str, Any]:
    """The plan's identity, with the points of the path where they were chosen by measuring."""
    if plan.fractions is None:
        return dict(plan.identity)
    attribution = {**plan.identity["attribution"], "path_points": list(plan.fractions)}
    return {**plan.identity, "attribution": attribution}


def build_attributor(
    config: Config,
    loaded: LoadedModel,
    *,
    microbatch: int | None = None,
    fractions: Sequence[float] | None = None,
    statistics: DataStatistics | None = None,
    optimizations: Optimizations | None = None,
    keep_open: bool = False,
) -> Attributor:
    """The attribution engine that a config describes, for a model in the type that it computes in.

    Args:
        config: the whole config.
        loaded: the model.
        microbatch: where the config leaves it to measuring; without, all images of a call at once (for a trial).
        fractions: points of the path, where the config leaves them to measuring; without, one step (for a trial).
        statistics: of the data set, where the target or the baseline needs it; without, made up (for a trial).
        optimizations: those that fit the model; without, the engine finds them out.
        keep_open: leave points of the path open where the config does, to choose them.
    """
    section = config.attribution
    method = METHODS.build(section.method.name, section.method.options)
    choices = (section.target, *section.further_targets)
    targets = [TARGETS.build(choice.name, choice.options) for choice in choices]
    if section.allow_mixing and isinstance(method, IntegratedGradients) and method.learns_points:
        raise ExtractionError(
            "attribution.method.options.points `learned` need images that do not influence each other, which "
            "attribution.allow_mixing does not ask for: set points to uniform"
        )
    if isinstance(method, IntegratedGradients) and method.is_open and not keep_open:
        method = method.with_points(fractions or TRIAL_PATH)
    if needs_statistics(config):
        known = statistics or _made_up_statistics(loaded)
        method, targets = method.fitted(known), [target.fitted(known) for target in targets]
    return Attributor(
        loaded.module.to(getattr(torch, section.dtype)),
        section.layers,
        method,
        targets,
        activations=section.activations,
        gradients=section.gradients,
        microbatch=microbatch if section.microbatch == "auto" else section.microbatch,
        # On a CPU other batches may give other last bits, and the error may pass: another actor tries again.
        halve=any(parameter.is_cuda for parameter in loaded.module.parameters()) and not section.deterministic,
        fold_batchnorm=section.fold_batchnorm,
        channels_last=section.channels_last,
        autocast=section.autocast,
        optimizations=optimizations,
        allow_random=section.allow_random,
        allow_mixing=section.allow_mixing,
    )


def open_method(config: Config) -> IntegratedGradients | None:
    """The config's method, if it leaves points of the path, or their number, to measuring."""
    method = METHODS.build(config.attribution.method.name, config.attribution.method.options)
    return method if isinstance(method, IntegratedGradients) and method.is_open else None


def _most_steps(config: Config) -> int | None:
    """Steps of an image's path at most, at least 1; None where they are chosen by measuring."""
    method = METHODS.build(config.attribution.method.name, config.attribution.method.options)
    return method.most_steps if isinstance(method, IntegratedGradients) else 1


def _made_up_statistics(loaded: LoadedModel) -> DataStatistics:
    """Statistics of the right shapes, with which one image can be tried before the data set is measured."""
    image = torch.zeros(loaded.preprocessing.shape)
    outputs = loaded.classes
    if outputs is None:
        raise ExtractionError("the target or the baseline needs a model whose output is [batch, outputs]")
    return DataStatistics(1, image.double(), torch.zeros(outputs).double(), torch.eye(outputs).double())


def check_free_space(plan: Plan, shards: Sequence[ShardInfo]) -> None:
    """Refuse to start shards that the disk cannot hold. Object stores do not tell how much they can.

    Raises:
        ExtractionError: with what is needed and what is free.
    """
    if "://" in plan.store:
        return
    contributions = sum(name.startswith("contribution") for name in plan.quantities)
    stored_arrays = len(plan.quantities) + contributions * (len(plan.targets) - 1)
    row_bytes = sum(plan.layers.values()) * stored_arrays * np.dtype(plan.config.attribution.dtype).itemsize
    rows = len(shards) * max(shard.samples for shard in shards)
    needed = int(rows * row_bytes * SPARE_FACTOR) + SPARE_BYTES
    folder = Path(plan.store).absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ExtractionError(
            f"the store {plan.store} needs about {needed / 1e9:,.2f} GB more, but {free / 1e9:,.2f} GB are free there: "
            "free space, or choose another place (store.location, or run.directory), fewer layers, or data.limit"
        )


def _check_class_names(index: ShardIndex, outputs: int | None) -> None:
    """Refuse shards that name more classes than the model has outputs: their labels are of another model."""
    if index.classes is not None and outputs is not None and len(index.classes) > outputs:
        raise ExtractionError(
            f"classes.json of {index.location} names {len(index.classes):,} classes, but the model has {outputs:,} "
            "outputs: take a model of these classes, or pack the images with the model's (shards pack --classes FILE)"
        )


def _check_labels(index: ShardIndex, classes: int | None, needed: bool, max_bad_fraction: float) -> None:
    """Refuse labels that the model has no output for, and missing ones where they are ``needed``, if too many.

    The others are dropped and named as they are read.
    """
    samples: pa.Table = index.samples()
    allowed = f"more than data.max_bad_fraction ({max_bad_fraction:g}) allows"
    last = f"{classes - 1}" if classes is not None else "the last output"
    outside = samples.filter(pc.greater_equal(samples["label"], classes)) if classes is not None else samples[:0]
    if len(outside) > max_bad_fraction * len(samples):
        row = outside.slice(0, 1).to_pylist()[0]
        raise ExtractionError(
            f"{row['key']} in {row['shard']} has the label {row['label']}, but the model's {classes} outputs are "
            f"numbered from 0 to {last} ({len(outside):,} of {len(samples):,} samples are beyond, {allowed}): choose a "
            "model of these classes, or check data.label_field"
        )
    missing = samples.filter(pc.is_null(samples["label"])) if needed else samples[:0]
    if len(missing) > max_bad_fraction * len(samples):
        row = missing.slice(0, 1).to_pylist()[0]
        raise ExtractionError(
            f"the target `label` needs a label from 0 to {last} for every sample, but {len(missing):,} of "
            f"{len(samples):,} have none, {allowed}: "
            f"{row['key']} in {row['shard']} has no label; check data.label_field or choose another target"
        )


def _try_one(config: Config, index: ShardIndex, loaded: LoadedModel, attributor: Attributor) -> AttributionResult:
    """Attribute the first image that can be, which shows what the stored quantities are."""
    reasons = []
    dropped: list[Dropped] = []
    for shard, sample in islice(_samples(config, index, loaded.classes), TRIED_SAMPLES):
        for batch in make_batches([sample], loaded.preprocessing, 1, dropped.append, needs_labels(attributor)):
            try:
                return attributor(batch.images, batch.labels)
            except NotFiniteError as error:
                dropped.append(Dropped(sample.position, sample.key, cause_of(error)))
        reasons.append(f"{sample.key} in {shard.name}: {dropped.pop().reason}")
    raise ExtractionError(
        f"none of the first {len(reasons):,} samples in {index.location} can be used: {reasons[0]}; check "
        "data.image_fields, the images and the model's weights"
        if reasons
        else f"there are no samples in {index.location}: check data.shards"
    )


def _samples(config: Config, index: ShardIndex, classes: int | None) -> Iterator[tuple[ShardInfo, Decoded]]:
    data = config.data
    for shard in index.shards:
        stream = read_shard(
            index.location, shard, image_fields=data.image_fields, label_field=data.label_field, classes=classes
        )
        for sample in stream:
            yield shard, sample


def needs_labels(attributor: Attributor) -> bool:
    """Whether samples without a label cannot be used."""
    return any(target.needs_labels for target in attributor.targets)


def cause_of(error: NotFiniteError) -> str:
    """What is not finite, without the place of the sample in its batch."""
    return str(error).partition(": ")[2] or str(error)


def pin_numerics(config: Config, device: torch.device) -> None:
    """Set this process up so that the numbers depend on the config alone: threads, full float32, kernels.

    Raises:
        ExtractionError: torch cannot use the GPU that this process was given.
    """
    torch.set_num_threads(config.cluster.cpus_per_actor)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ExtractionError(
                "a GPU was given to this process, but torch cannot use it: install a CUDA build of torch that fits "
                "the driver, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPUs"
            )
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        if config.attribution.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
