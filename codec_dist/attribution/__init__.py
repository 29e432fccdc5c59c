"""How much each hidden unit adds to the output: the contribution engine, its methods, targets and reductions."""

from codec_dist.attribution.capture import Capture, Captured, borrowed, edited
from codec_dist.attribution.cuts import find_cuts
from codec_dist.attribution.engine import Attributor
from codec_dist.attribution.errors import AttributionError, NotFiniteError
from codec_dist.attribution.methods import METHODS, ActivationGradient, IntegratedGradients, Method, SmoothGradient
from codec_dist.attribution.reductions import Reduction, make_reduction
from codec_dist.attribution.results import AttributionResult, LayerResult, relative_residual
from codec_dist.attribution.targets import (
    TARGETS,
    Contrast,
    Entropy,
    GivenClass,
    OutputSum,
    Target,
    TopK,
    TrueLabel,
)

__all__ = [
    "METHODS",
    "TARGETS",
    "ActivationGradient",
    "AttributionError",
    "AttributionResult",
    "Attributor",
    "Capture",
    "Captured",
    "Contrast",
    "Entropy",
    "GivenClass",
    "IntegratedGradients",
    "LayerResult",
    "Method",
    "NotFiniteError",
    "OutputSum",
    "Reduction",
    "SmoothGradient",
    "Target",
    "TopK",
    "TrueLabel",
    "borrowed",
    "edited",
    "find_cuts",
    "make_reduction",
    "relative_residual",
]
