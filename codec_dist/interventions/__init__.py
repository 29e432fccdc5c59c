"""Causal tests of modes: change a layer's channels and watch the accuracy of classes (METHOD §6)."""

from codec_dist.interventions.contexts import ablate, add, preserve, scale
from codec_dist.interventions.counting import count_correct
from codec_dist.interventions.counts import InterventionCounts
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.files import InterventionResults, read_results, write_results
from codec_dist.interventions.planning import (
    Condition,
    Experiment,
    channel_counts,
    choose_off_targets,
    plan_experiment,
    random_order,
    rank_channels,
)
from codec_dist.interventions.trials import areas, curves, trials

__all__ = [
    "Condition",
    "Experiment",
    "InterventionCounts",
    "InterventionError",
    "InterventionResults",
    "ablate",
    "add",
    "areas",
    "channel_counts",
    "choose_off_targets",
    "count_correct",
    "curves",
    "plan_experiment",
    "preserve",
    "random_order",
    "rank_channels",
    "read_results",
    "scale",
    "trials",
    "write_results",
]
