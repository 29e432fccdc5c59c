"""The stage `intervene`: causal tests, counted shard by shard on Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch

from codec_dist.cluster_runtime import map_fold
from codec_dist.config import Config
from codec_dist.interventions import (
    Experiment,
    InterventionCounts,
    choose_off_targets,
    count_correct,
    plan_experiment,
    trials,
    write_results,
)
from codec_dist.modes import ModeSummary
from codec_dist.pipeline.data import stored_part
from codec_dist.pipeline.images import load_run_model, run_index, shard_images
from codec_dist.pipeline.inputs import StageInputs
from codec_dist.pipeline.selection import chosen_saes, class_mode_rows, matching_saes
from codec_dist.pipeline.stage import StageContext
from codec_dist.shards import ShardInfo
from codec_dist.store import ContributionStore
from codec_dist.utils import Progress, derive_seed


class LayerCounts(dict[str, InterventionCounts]):
    """Counts by layer key; merges layer by layer."""

    def merge(self, other: "LayerCounts") -> "LayerCounts":
        """Add counts of other images; returns self."""
        for layer, counts in other.items():
            self[layer].merge(counts)
        return self


@dataclass(frozen=True)
class ChosenImages:
    """The images of one shard that take part."""

    shard: ShardInfo
    keys: tuple[str, ...]


@dataclass(frozen=True)
class CountShard:
    """What one task does: all experiments on the chosen images of one shard."""

    config: Config
    experiments: tuple[Experiment, ...]

    def __call__(self, chosen: ChosenImages) -> LayerCounts:
        """Decode and run; deterministic, so that a lost task can be run again."""
        samples = list(shard_images(self.config, chosen.shard, chosen.keys))
        model = load_run_model(self.config).module
        images = torch.stack([sample.image for sample in samples]) if samples else torch.empty(0)
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        batch_size = self.config.interventions.batch_size
        counts = LayerCounts()
        for experiment in self.experiments:
            if samples:
                counts[experiment.layer] = count_correct(
                    model, experiment.layer, images, labels, experiment.conditions, batch_size
                )
            else:
                counts[experiment.layer] = InterventionCounts.empty(experiment.layer, experiment.conditions)
        return counts


def check_interventions(inputs: StageInputs) -> None:
    """Refuse layers and quantities without an SAE.

    Raises:
        PipelineError: with the nearest names.
    """
    settings, trained = inputs.config.interventions, inputs.selected is not None
    matching_saes(inputs.saes, settings.layers, settings.quantities, "interventions", trained_yet=trained)


def intervene(context: StageContext) -> dict[str, Any]:
    """Ablate and preserve the channels of each class's top mode; write ``interventions/``.

    Where fewer than two classes have labelled images there is nothing to compare: the tables are empty.
    """
    config, run = context.config, context.run
    images, images_of_class = _choose_images(context)
    classes = sorted(images_of_class)
    if len(classes) < 2:
        write_results(run.interventions, [])
        return {"layers": 0, "left out": f"{len(classes)} classes have labelled images, two are needed"}
    experiments = _plan(context, classes)
    with context.ray(), Progress("intervene", total=len(images), unit="shards") as progress:
        counts = map_fold(images, CountShard(config, experiments), progress=progress)
    results = write_results(
        run.interventions, [trials(counts[experiment.layer], experiment) for experiment in experiments]
    )
    if context.tracker is not None:
        context.tracker.table("interventions/auc", results.auc.column_names, _rows(results.auc))
    return {
        "layers": len(experiments),
        "conditions": sum(len(experiment.conditions) for experiment in experiments),
        "images": sum(images_of_class.values()),
    }


def _plan(context: StageContext, classes: Sequence[int]) -> tuple[Experiment, ...]:
    config, settings = context.config, context.config.interventions
    summary = ModeSummary.load(context.run.modes)
    channels = ContributionStore(context.run.store).layers
    rankings: dict[str, dict[str, dict[int, Any]]] = {}
    for layer, quantity, folder in chosen_saes(context.run, settings.layers, settings.quantities, "interventions"):
        rows = class_mode_rows(summary.modes(layer, quantity), folder)
        kept = {index: row for index, row in rows.items() if index in classes}
        rankings.setdefault(layer, {})[quantity] = kept
    seed = derive_seed(config.run.seed, "interventions")
    off_targets = choose_off_targets(classes, settings.off_targets, seed)
    return tuple(
        plan_experiment(
            layer,
            channels[layer],
            modes,
            off_targets=off_targets,
            percentages=settings.percentages,
            random_draws=settings.random_draws,
            seed=seed,
        )
        for layer, modes in rankings.items()
    )


def _choose_images(context: StageContext) -> tuple[list[ChosenImages], dict[int, int]]:
    """Up to ``images_per_class`` images of each class, by shard, and how many there are of each class.

    Only images that the store has: what extraction dropped stays out.
    """
    config = context.config
    table = stored_part(context, "evaluate")
    rows = table.filter(pc.is_valid(table["label"])).to_pylist()
    seed = derive_seed(config.run.seed, "interventions")
    keys: dict[str, list[str]] = {}
    taken: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: derive_seed(seed, row["shard"], row["key"])):
        if taken.get(row["label"], 0) < config.interventions.images_per_class:
            taken[row["label"]] = taken.get(row["label"], 0) + 1
            keys.setdefault(row["shard"], []).append(row["key"])
    chosen = [ChosenImages(info, tuple(keys[info.name])) for info in run_index(config).shards if info.name in keys]
    return chosen, taken


def _rows(table: Any) -> list[list[Any]]:
    return [list(row.values()) for row in table.to_pylist()]
