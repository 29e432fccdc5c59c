"""Causal tests of modes: change a layer's channels and watch the accuracy of classes (docs/method.md §6)."""

from codec_dist.interventions.class_results import (
    RESULTS_FORMAT,
    InterventionResults,
    LayerResults,
    layer_results,
    read_results,
    results_are_current,
    write_results,
)
from codec_dist.interventions.contexts import ablate, add, preserve, scale
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import (
    Condition,
    Experiment,
    channel_counts,
    choose_off_targets,
    choose_targets,
    plan_experiment,
    random_order,
    rank_channels,
)
from codec_dist.interventions.running import InterventionCounts, count_correct
from codec_dist.interventions.uncertainty import areas, curves, nulls

__all__ = [
    "Condition",
    "Experiment",
    "InterventionCounts",
    "InterventionError",
    "InterventionResults",
    "LayerResults",
    "RESULTS_FORMAT",
    "ablate",
    "add",
    "areas",
    "channel_counts",
    "choose_off_targets",
    "choose_targets",
    "count_correct",
    "curves",
    "layer_results",
    "nulls",
    "plan_experiment",
    "preserve",
    "random_order",
    "rank_channels",
    "read_results",
    "results_are_current",
    "scale",
    "write_results",
]
