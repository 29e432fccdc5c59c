"""What is chosen by measuring, once per store: device, optimisations, microbatch, data statistics, path points."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch

from codec_dist.attribution import DataStatistics, Optimizations
from codec_dist.cluster_runtime import cluster_device, map_fold
from codec_dist.config import Config
from codec_dist.extraction.batches import Batch, Dropped, make_batches
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.identity import needs_statistics
from codec_dist.extraction.microbatch import resolve_microbatch
from codec_dist.extraction.path_calibration import resolve_points
from codec_dist.extraction.plan import (
    Plan,
    build_attributor,
    needs_labels,
    no_points,
    open_method,
    open_store,
    pin_numerics,
    with_stored_points,
)
from codec_dist.models import LoadedModel, load_model, model_line, reason_of
from codec_dist.shards import ShardInfo, configured_index, configured_split, read_shard
from codec_dist.utils import Progress, hash_file, write_atomically

# Images on which the engine's optimisations are tried.
CHECKED_IMAGES = 2


def calibrate(plan: Plan, shards: Sequence[ShardInfo]) -> tuple[Plan, str]:
    """Measure what the config leaves to that, and make the store; or take what the store was made with.

    Needs an open Ray session.

    Returns:
        The plan with what was calibrated, and the device: ``cuda`` or ``cpu``, never both in one store.

    Raises:
        ExtractionError: the store was begun on GPUs and there are none now, or no image can be measured.
        AttributionError: no number of steps is complete enough.
        StoreError: the store at the run's place was made with other settings.
    """
    settings = None
    if plan.store_exists:
        plan = with_stored_points(plan)
        settings = open_store(plan, shards)
        if plan.fractions is None and open_method(plan.config) is not None:
            raise no_points(plan.store, None)
    device = _choose_device(plan, settings)
    plan = replace(plan, optimizations=_resolve_optimizations(plan, shards, settings, device))
    plan, sizes = resolve_microbatch(plan, settings, device)
    if needs_statistics(plan.config):
        plan = replace(plan, statistics=_find_statistics(plan, shards, settings))
    plan, measured = resolve_points(plan, shards, device)
    if settings is None:
        hashes = {} if plan.statistics is None else {"statistics": hash_file(plan.statistics)}
        found = {"device": device, "optimizations": asdict(plan.optimizations)}
        open_store(plan, shards, {**found, **sizes, **hashes, **measured})
    return plan, device


def _choose_device(plan: Plan, settings: Any) -> str:
    """Whoever makes the store decides; others, and those who resume, read it there."""
    present = cluster_device()
    device: str = (settings or {}).get("device") or present
    if device not in ("cpu", "cuda"):
        raise ExtractionError(
            f"the store {plan.store} says that it was made on {device!r}, which is neither cpu nor cuda: restore it "
            "from a copy, or remove it"
        )
    if device == "cuda" and present != "cuda":
        raise ExtractionError(
            f"the store {plan.store} was begun on GPUs, whose numbers are not those of CPUs to the last bit, and no "
            "node has a GPU now: add one, or choose another store.location (or remove the store) to run on CPUs"
        )
    if device != present:
        sys.stderr.write(f"extract: the store {plan.store} was begun on CPUs and is completed on CPUs\n")
    return device


# --- the engine's self-check ------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """What the self-check found, with nothing to merge: it runs once."""

    optimizations: Optimizations
    left_out: dict[str, str]

    def merge(self, other: "Checked") -> None:
        """Never called: there is one."""


@dataclass(frozen=True)
class CheckOnDevice:
    """The engine's self-check where the actors will compute; plain, so that it travels to a worker."""

    plan: Plan
    shards: tuple[ShardInfo, ...]
    device: str

    def __call__(self, item: None) -> Checked:
        """Try the optimisations on two images.

        Raises:
            ExtractionError: torch cannot use the device, no image can be read, or the model does not run there.
        """
        plan, device = self.plan, torch.device(self.device)
        pin_numerics(plan.config, device)
        loaded = load_model(plan.config.model, seed=plan.config.run.seed)
        loaded.module.to(device)
        attributor = build_attributor(plan.config, loaded)
        images = _probe_batch(plan, self.shards, loaded, needs_labels(attributor), CHECKED_IMAGES).images
        try:
            attributor.probe(images)
        except RuntimeError as error:
            # Such as an operation that has no deterministic form on GPUs, or one that has none there at all.
            reason = model_line(error) or f"{type(error).__name__}: {reason_of(error)}"
            raise ExtractionError(f"the model cannot be explained on {self.device}: {reason}") from error
        return Checked(attributor.optimizations, attributor.left_out)


def _resolve_optimizations(plan: Plan, shards: Sequence[ShardInfo], settings: Any, device: str) -> Optimizations:
    """Those that the store was made with; else what the self-check finds on the device that computes."""
    stored = (settings or {}).get("optimizations")
    if stored is not None:
        return _read_optimizations(plan, stored)
    if device == "cpu":
        return plan.optimizations
    check = CheckOnDevice(plan, tuple(shards), device)
    checked = map_fold([None], check, num_cpus=plan.config.cluster.cpus_per_actor, num_gpus=1)
    for name, reason in checked.left_out.items():
        sys.stderr.write(f"extract: {name} is switched off for this model on GPUs: with it {reason}\n")
    return checked.optimizations


def _read_optimizations(plan: Plan, stored: Any) -> Optimizations:
    names = {each.name for each in fields(Optimizations)}
    if (
        not isinstance(stored, dict)
        or stored.keys() != names
        or not all(type(each) is bool for each in stored.values())
    ):
        raise ExtractionError(
            f"the store {plan.store} does not say with which optimizations it was made ({stored!r}): restore it from a "
            "copy, or remove it"
        )
    return Optimizations(**stored)


# --- statistics of the data set --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardStatistics:
    """Measures one shard; plain, so that it travels to a worker."""

    config: Config
    location: str
    microbatch: int
    keys: dict[str, frozenset[str]]

    def __call__(self, info: ShardInfo) -> "PartialStatistics":
        """Statistics of the samples of one shard that belong to the part."""
        torch.set_num_threads(self.config.cluster.cpus_per_actor)
        loaded = load_model(self.config.model, seed=self.config.run.seed)
        data, dropped = self.config.data, list[Dropped]()
        samples = read_shard(
            self.location,
            info,
            image_fields=data.image_fields,
            label_field=data.label_field,
            threads=data.decode_threads,
            classes=loaded.classes,
            keys=self.keys[info.name],
        )
        batches = make_batches(samples, loaded.preprocessing, self.microbatch, dropped.append, labelled=False)
        first = next(batches, None)
        if first is None:
            return PartialStatistics(None)
        # The model itself gets them, whose last bits may depend on how they lie in memory.
        images = (batch.images.contiguous() for batch in chain([first], batches))
        return PartialStatistics(DataStatistics.measure(loaded.module, images))


@dataclass
class PartialStatistics:
    """Statistics of some samples, or of none."""

    statistics: DataStatistics | None

    def merge(self, other: "PartialStatistics") -> None:
        """Take in those of other samples."""
        if self.statistics is None:
            self.statistics = other.statistics
        elif other.statistics is not None:
            self.statistics.merge(other.statistics)


def _find_statistics(plan: Plan, shards: Sequence[ShardInfo], settings: Any) -> Path:
    """The file with the statistics of the fit part; measured again if it is not the one of the store."""
    path = Path(plan.config.run.directory) / "statistics.safetensors"
    wanted = (settings or {}).get("statistics")
    if path.exists() and wanted is not None and hash_file(path) == wanted:
        return path
    statistics = _measure(plan, shards)
    write_atomically(path, statistics.save)
    if wanted is not None and hash_file(path) != wanted:
        raise ExtractionError(
            f"the statistics of the data set in {path} are not those that the store {plan.store} was made with, and "
            "measuring gave others: use as many CPUs per actor and the versions of that run, or remove the store"
        )
    return path


def _measure(plan: Plan, shards: Sequence[ShardInfo]) -> DataStatistics:
    config = plan.config
    table = configured_split(config, configured_index(config).samples())
    table = table.filter(pc.equal(table["part"], "fit"))
    keys: dict[str, set[str]] = {shard.name: set() for shard in shards}
    for name, key in zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True):
        keys[name].add(key)
    frozen = {name: frozenset(members) for name, members in keys.items()}
    with Progress("measure", len(shards), "shards") as progress:
        found = map_fold(
            shards,
            ShardStatistics(config, plan.location, plan.microbatch, frozen),
            num_cpus=config.cluster.cpus_per_actor,
            at_once=config.cluster.actors,
            progress=progress,
        )
    if found.statistics is None:
        raise ExtractionError(
            f"no image of the fit part of {plan.location} can be measured for the target or the baseline: check "
            "data.image_fields and data.split"
        )
    return found.statistics


def _probe_batch(plan: Plan, shards: Sequence[ShardInfo], loaded: LoadedModel, labelled: bool, size: int) -> Batch:
    data, dropped = plan.config.data, list[Dropped]()
    samples = chain.from_iterable(
        read_shard(
            plan.location,
            shard,
            image_fields=data.image_fields,
            label_field=data.label_field,
            classes=loaded.classes,
        )
        for shard in shards
    )
    batches = make_batches(samples, loaded.preprocessing, size, dropped.append, labelled)
    batch = next(batches, None)
    if batch is None:
        reason = f": {dropped[0].key}: {dropped[0].reason}" if dropped else ""
        raise ExtractionError(f"no image of {plan.location} can be used to try the model on{reason}")
    return batch
