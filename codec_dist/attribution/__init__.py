"""How much each hidden unit adds to the output: the contribution engine, its methods, targets and reductions."""

from codec_dist.attribution.baselines import BASELINES, Baseline, Blur, Constant, GivenImage, MeanImage, Zeros
from codec_dist.attribution.capture import Capture, Captured, borrowed, edited
from codec_dist.attribution.cuts import find_cuts
from codec_dist.attribution.data_statistics import DataStatistics
from codec_dist.attribution.engine import Attributor
from codec_dist.attribution.errors import AttributionError, NotFiniteError
from codec_dist.attribution.memory import is_out_of_memory
from codec_dist.attribution.methods import METHODS, ActivationGradient, IntegratedGradients, Method, SmoothGradient
from codec_dist.attribution.reductions import Reduction, make_reduction
from codec_dist.attribution.results import AttributionResult, LayerResult, relative_residual
from codec_dist.attribution.steps import StepsChoice, choose_steps
from codec_dist.attribution.targets import (
    TARGETS,
    Contrast,
    Entropy,
    FunctionTarget,
    GivenClass,
    OutputSum,
    Rank,
    Surprisal,
    Target,
    TopK,
    TrueLabel,
)

__all__ = [
    "BASELINES",
    "METHODS",
    "TARGETS",
    "ActivationGradient",
    "AttributionError",
    "AttributionResult",
    "Attributor",
    "Baseline",
    "Blur",
    "Capture",
    "Captured",
    "Constant",
    "Contrast",
    "DataStatistics",
    "Entropy",
    "FunctionTarget",
    "GivenClass",
    "GivenImage",
    "IntegratedGradients",
    "LayerResult",
    "MeanImage",
    "Method",
    "NotFiniteError",
    "OutputSum",
    "Rank",
    "Reduction",
    "SmoothGradient",
    "StepsChoice",
    "Surprisal",
    "Target",
    "TopK",
    "TrueLabel",
    "Zeros",
    "borrowed",
    "choose_steps",
    "edited",
    "find_cuts",
    "is_out_of_memory",
    "make_reduction",
    "relative_residual",
]
