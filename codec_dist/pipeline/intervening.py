"""The stage `intervene`: causal tests, counted shard by shard on Ray."""

from collections.abc import Mapping, Sequence
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
from codec_dist.pipeline.data import class_names, read_part
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.images import load_run_model, shard_images
from codec_dist.pipeline.selection import chosen_saes, class_mode_rows
from codec_dist.pipeline.stage import StageContext
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
class CountShard:
    """What one task does: all experiments on the chosen images of one shard."""

    config: Config
    experiments: tuple[Experiment, ...]
    keys: Mapping[str, Sequence[str]]
    """Shard name → keys of the images that take part."""

    def __call__(self, shard: str) -> LayerCounts:
        """Decode and run; deterministic, so that a lost task can be run again."""
        samples = list(shard_images(self.config, shard, self.keys[shard]))
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


def intervene(context: StageContext) -> dict[str, Any]:
    """Ablate and preserve the channels of each class's top mode; write ``interventions/``."""
    config, run = context.config, context.run
    keys, images_of_class = _choose_images(context)
    # A ratio needs some images: classes without any on *evaluate* cannot be targets.
    classes = [index for index in range(len(class_names(config))) if images_of_class.get(index)]
    experiments = _plan(context, classes)
    context.need_ray()
    with Progress("intervene", total=len(keys), unit="shards") as progress:
        counts = map_fold(sorted(keys), CountShard(config, experiments, keys), progress=progress)
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


def _choose_images(context: StageContext) -> tuple[dict[str, list[str]], dict[int, int]]:
    """Up to ``images_per_class`` images of each class, by shard, and how many there are of each class."""
    config = context.config
    table = read_part(context, "evaluate")
    table = table.filter(pc.is_valid(table["label"]))
    if not len(table):
        raise PipelineError(
            "interventions compare accuracies of classes, but no image of the evaluate part has a label"
        )
    seed = derive_seed(config.run.seed, "interventions")
    rows = sorted(table.to_pylist(), key=lambda row: derive_seed(seed, row["shard"], row["key"]))
    keys: dict[str, list[str]] = {}
    taken: dict[int, int] = {}
    for row in rows:
        if taken.get(row["label"], 0) < config.interventions.images_per_class:
            taken[row["label"]] = taken.get(row["label"], 0) + 1
            keys.setdefault(row["shard"], []).append(row["key"])
    return keys, taken


def _rows(table: Any) -> list[list[Any]]:
    return [list(row.values()) for row in table.to_pylist()]
