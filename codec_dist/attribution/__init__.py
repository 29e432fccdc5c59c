"""How much each hidden unit adds to the output: the contribution engine, its methods, targets and reductions."""

from codec_dist.attribution.baselines import BASELINES, Baseline, Blur, Constant, GivenImage, MeanImage, Zeros
from codec_dist.attribution.capture import Capture, Captured, borrowed, edited, find_cuts
from codec_dist.attribution.data_statistics import DataStatistics
from codec_dist.attribution.engine import Attributor
from codec_dist.attribution.errors import AttributionError, NotFiniteError
from codec_dist.attribution.image_memory import is_out_of_memory
from codec_dist.attribution.interval_errors import IntervalErrors
from codec_dist.attribution.learned_points import learn_points
from codec_dist.attribution.methods import METHODS, ActivationGradient, IntegratedGradients, Method, SmoothGradient
from codec_dist.attribution.path_choice import PathChoice, choose_from, choose_path, dense_path
from codec_dist.attribution.path_points import (
    POINTS,
    GivenPoints,
    LearnedPoints,
    PathPoints,
    PowerPoints,
    UniformPoints,
)
from codec_dist.attribution.reductions import Reduction, make_reduction, needs_trace
from codec_dist.attribution.refinement import Adaptive, as_adaptive
from codec_dist.attribution.results import AttributionResult, LayerResult, relative_residual
from codec_dist.attribution.self_check import Optimizations
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
from codec_dist.attribution.tracing import Traced, trace_layers

__all__ = [
    "BASELINES",
    "METHODS",
    "POINTS",
    "TARGETS",
    "ActivationGradient",
    "Adaptive",
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
    "GivenPoints",
    "IntegratedGradients",
    "IntervalErrors",
    "LayerResult",
    "LearnedPoints",
    "MeanImage",
    "Method",
    "NotFiniteError",
    "Optimizations",
    "OutputSum",
    "PathChoice",
    "PathPoints",
    "PowerPoints",
    "Rank",
    "Reduction",
    "SmoothGradient",
    "Surprisal",
    "Target",
    "TopK",
    "Traced",
    "TrueLabel",
    "UniformPoints",
    "Zeros",
    "as_adaptive",
    "borrowed",
    "choose_from",
    "choose_path",
    "dense_path",
    "edited",
    "find_cuts",
    "is_out_of_memory",
    "learn_points",
    "make_reduction",
    "needs_trace",
    "relative_residual",
    "trace_layers",
]
