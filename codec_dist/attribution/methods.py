"""Methods: from evaluations of the model to contributions of every hidden unit (METHOD: "Contributions")."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.models.layers import LayerKey
from codec_dist.utils import Registry, derive_seed

Images = Float[Tensor, "batch ..."]


class Contributions(NamedTuple):
    """What a method finds for one batch."""

    totals: dict[LayerKey, Tensor]
    """For each site, contributions shaped like its hidden tensor."""
    baseline_value: Float[Tensor, "batch"] | None
    """T(x₀), for methods that compare with a baseline."""


class Method(ABC):
    """How contributions are computed."""

    complete: ClassVar[bool] = False
    """Whether the contributions of a cut layer add up to T(x) - T(x₀)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A label that is safe in paths."""

    @abstractmethod
    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """Contributions of every site. ``at_images`` is the method's to use up and change."""


METHODS: Registry[Method] = Registry("attribution method", AttributionError)


@METHODS.register("integrated_gradients")
class IntegratedGradients(Method):
    """Integrated gradients of hidden units, by the trapezoid rule along the hidden trajectory.

    C = Σ_{i=1..S} ½ (g_{i-1} + g_i) ⊙ (h_i - h_{i-1}) at x_i = x₀ + (i/S)(x - x₀); also known as layer
    conductance (Dhamdhere, Sundararajan, Yan 2018). S steps cost S evaluations, and one of a single image
    for the baseline.

    Args:
        steps: S, at least 1.
        baseline: x₀, the same for all images: ``"zeros"`` (the mean-colour image), or a tensor shaped like
            one image.
    """

    complete = True

    def __init__(self, steps: int = 10, baseline: str | Tensor = "zeros") -> None:
        require_whole("integrated_gradients: steps", steps, least=1)
        if isinstance(baseline, str) and baseline != "zeros":
            raise AttributionError(f"integrated_gradients: unknown baseline {baseline!r}: use `zeros`, or a tensor")
        self.steps, self.baseline = steps, baseline

    @property
    def name(self) -> str:
        """``integrated_gradients_10``."""
        return f"integrated_gradients_{self.steps}"

    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """Walk from the images down to the baseline, so that targets are chosen where the walk begins."""
        start = self._start(images)
        difference = images - start
        totals: dict[LayerKey, Tensor] = {}
        for step in range(self.steps - 1, -1, -1):
            if step:
                point = evaluation.at(start + (step / self.steps) * difference)
            else:
                point = evaluation.at_constant(start, images.shape[0])
            _add_trapezoid(totals, at_images, point)
            # The upper end of the next step; nothing of the points above is kept.
            at_images.hidden.update(point.hidden)
            at_images.gradient.update(point.gradient)
        return Contributions(totals, point.target.expand(images.shape[0]))

    def _start(self, images: Images) -> Tensor:
        if isinstance(self.baseline, str):
            return torch.zeros_like(images[:1])
        if self.baseline.shape != images.shape[1:]:
            found, needed = list(self.baseline.shape), list(images.shape[1:])
            raise AttributionError(f"integrated_gradients: the baseline is {found}, the images are {needed}")
        return self.baseline.to(images)[None]


@METHODS.register("activation_gradient")
@dataclass(frozen=True)
class ActivationGradient(Method):
    """Activation times gradient at the image, h ⊙ g, optionally of unit norm per sample over all of h.

    Args:
        normalize: ``neither``, ``gradient`` (h ⊙ g/‖g‖₂) or ``both`` (h/‖h‖₂ ⊙ g/‖g‖₂).
    """

    normalize: str = "neither"

    def __post_init__(self) -> None:
        if self.normalize not in ("neither", "gradient", "both"):
            raise AttributionError(
                f"activation_gradient: normalize is {self.normalize!r}: use neither, gradient or both"
            )

    @property
    def name(self) -> str:
        """``activation_gradient``, ``activation_gradient_normalized_both``."""
        return "activation_gradient" + ("" if self.normalize == "neither" else f"_normalized_{self.normalize}")

    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """The product at the images; no further evaluation."""
        totals = {}
        for site, hidden in at_images.hidden.items():
            gradient = at_images.gradient[site]
            hidden = _unit(hidden) if self.normalize == "both" else hidden
            totals[site] = hidden * (gradient if self.normalize == "neither" else _unit(gradient))
        return Contributions(totals, None)


@METHODS.register("smooth_gradient")
@dataclass(frozen=True)
class SmoothGradient(Method):
    """Mean of h ⊙ g over noisy copies of the image (SmoothGrad, Smilkov et al. 2017).

    All images meet the same noise, so that results do not depend on how they are batched.

    Args:
        samples: number of noisy copies.
        sigma: standard deviation of the Gaussian noise, in units of the normalised input.
        seed: seed of the noise.
    """

    samples: int = 20
    sigma: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("smooth_gradient: samples", self.samples, least=1)
        if self.sigma < 0:
            raise AttributionError(f"smooth_gradient: sigma is {self.sigma}: it must not be below 0")

    @property
    def name(self) -> str:
        """``smooth_gradient_20``."""
        return f"smooth_gradient_{self.samples}"

    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """One evaluation per noisy copy."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "smooth_gradient"))
        totals: dict[LayerKey, Tensor] = {}
        for _ in range(self.samples):
            noise = torch.randn(images.shape[1:], generator=generator, dtype=torch.float32).to(images)
            point = evaluation.at(images + self.sigma * noise)
            for site, hidden in point.hidden.items():
                product = hidden.mul(point.gradient[site]).div_(self.samples)
                totals[site] = totals[site].add_(product) if site in totals else product
        return Contributions(totals, None)


def _add_trapezoid(totals: dict[LayerKey, Tensor], upper: Point, lower: Point) -> None:
    """Add ½ (g_lower + g_upper) ⊙ (h_upper - h_lower) for each site, in place."""
    for site, hidden in upper.hidden.items():
        gradient_sum = upper.gradient[site] + lower.gradient[site]
        change = hidden - lower.hidden[site]
        if site in totals:
            totals[site].addcmul_(change, gradient_sum, value=0.5)
        else:
            totals[site] = change.mul_(gradient_sum).mul_(0.5)


def _unit(tensor: Tensor) -> Tensor:
    """Each sample divided by its norm over everything; zero stays zero."""
    norm = tensor.flatten(1).norm(dim=1).clamp_min(torch.finfo(tensor.dtype).tiny)
    return tensor / norm.reshape(-1, *[1] * (tensor.ndim - 1))
