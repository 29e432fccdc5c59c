"""The stage `intervene`: causal tests, counted shard by shard on Ray."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from codec_dist.cluster_runtime import map_fold
from codec_dist.config import Config
from codec_dist.interventions import (
    Experiment,
    InterventionCounts,
    InterventionResults,
    choose_off_targets,
    choose_targets,
    count_correct,
    layer_results,
    plan_experiment,
    write_results,
)
from codec_dist.modes import ModeSummary
from codec_dist.pipeline.images import load_run_model, run_index, shard_images
from codec_dist.pipeline.preparing import stored_part
from codec_dist.pipeline.selected_saes import chosen_saes, class_mode_rows
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

    def __call__(self, selected: ChosenImages) -> LayerCounts:
        """Decode and run; deterministic, so that a lost task can be run again."""
        samples = list(shard_images(self.config, selected.shard, selected.keys))
        model = load_run_model(self.config).module
        images = torch.stack([sample.image for sample in samples]) if samples else torch.empty(0)
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        batch_size = self.config.interventions.batch_size
        counts = LayerCounts()
        for experiment in self.experiments:
            conditions = experiment.conditions
            if samples:
                counted = count_correct(model, experiment.layer, images, labels, conditions, batch_size)
            else:
                counted = InterventionCounts.empty(experiment.layer, conditions)
            counts[experiment.layer] = counted
        return counts


def intervene(context: StageContext) -> dict[str, Any]:
    """Ablate and preserve the channels of each class's top mode; write ``interventions/``.

    Where fewer than two classes have labelled images, or no class has a mode, there is nothing to compare: the
    tables are empty.
    """
    config, run = context.config, context.run
    seed = derive_seed(config.run.seed, "interventions")
    table = stored_part(context, "evaluate")
    table = table.filter(pc.is_valid(table["label"]))
    classes = sorted(pc.unique(table["label"]).to_pylist())
    experiments = _plan(context, classes, seed) if len(classes) > 1 else ()
    if not experiments:
        write_results(run.interventions, [], seed)
        few = f"{len(classes)} classes have labelled images, two are needed"
        return {"layers": 0, "left out": few if len(classes) < 2 else "no class has a mode of its own"}
    needed = {label for experiment in experiments for label in experiment.classes}
    images = _choose_images(config, table, needed, seed)
    with context.ray(), Progress("intervene", total=len(images), unit="shards") as progress:
        counts = map_fold(images, CountShard(config, experiments), progress=progress)
    results = write_results(
        run.interventions, [layer_results(counts[experiment.layer], experiment) for experiment in experiments], seed
    )
    _log(context, results)
    return {
        "layers": len(experiments),
        "conditions": sum(len(experiment.conditions) for experiment in experiments),
        "subjects": len({target for experiment in experiments for target in experiment.off_targets}),
        "images": sum(len(selected.keys) for selected in images),
    }


def _plan(context: StageContext, classes: Sequence[int], seed: int) -> tuple[Experiment, ...]:
    settings = context.config.interventions
    summary = ModeSummary.load(context.run.modes)
    channels = ContributionStore(context.run.store).layers
    targets = choose_targets(classes, settings.targets, seed)
    off_targets = choose_off_targets(classes, settings.off_targets, seed, targets)
    rankings: dict[str, dict[str, dict[int, Any]]] = {}
    for layer, quantity, folder in chosen_saes(context.run, settings.layers, settings.quantities, "interventions"):
        rows = class_mode_rows(summary.modes(layer, quantity), folder)
        kept = {target: rows[target] for target in targets if target in rows}
        if kept:
            rankings.setdefault(layer, {})[quantity] = kept
    return tuple(
        plan_experiment(
            layer,
            channels[layer],
            modes,
            # A class without a mode needs no random rankings to be compared with.
            off_targets={
                target: off_targets[target] for target in targets if any(target in rows for rows in modes.values())
            },
            percentages=settings.percentages,
            random_draws=settings.random_draws,
            seed=seed,
        )
        for layer, modes in rankings.items()
    )


def _choose_images(config: Config, samples: pa.Table, classes: Collection[int], seed: int) -> list[ChosenImages]:
    """Up to ``images_per_class`` images of each class, by shard.

    Args:
        config: the run's.
        samples: labelled samples that the store has (what extraction dropped stays out): shard, key, label.
        classes: classes whose images are needed.
        seed: seed of the choice.
    """
    keys: dict[str, list[str]] = {}
    taken = dict.fromkeys(classes, 0)
    rows = [row for row in samples.to_pylist() if row["label"] in taken]
    for row in sorted(rows, key=lambda row: derive_seed(seed, row["shard"], row["key"])):
        if taken[row["label"]] < config.interventions.images_per_class:
            taken[row["label"]] += 1
            keys.setdefault(row["shard"], []).append(row["key"])
    return [ChosenImages(info, tuple(keys[info.name])) for info in run_index(config).shards if info.name in keys]


def _log(context: StageContext, results: InterventionResults) -> None:
    if context.tracker is None:
        return
    for name in ("auc", "nulls", "curves"):
        table: pa.Table = getattr(results, name)
        rows = [list(row.values()) for row in table.to_pylist()]
        context.tracker.table(f"interventions/{name}", table.column_names, rows)
