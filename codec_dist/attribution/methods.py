"""Methods: from evaluations of the model to contributions of every hidden unit (docs/method.md §2)."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.baselines import Baseline, as_baseline
from codec_dist.attribution.capture import widened
from codec_dist.attribution.data_statistics import DataStatistics
from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.attribution.path_points import (
    Fractions,
    GivenPoints,
    LearnedPoints,
    PathPoints,
    UniformPoints,
    as_points,
)
from codec_dist.attribution.path_sums import HiddenTotal, PathSum, WholeTotal, path_sum_for
from codec_dist.attribution.refinement import Adaptive, ImagePaths, as_adaptive
from codec_dist.models import LayerKey
from codec_dist.utils import Registry, derive_seed

# S of the paper.
DEFAULT_STEPS = 10

Images = Float[Tensor, "batch ..."]
Totals = dict[LayerKey, HiddenTotal]


class Contributions(NamedTuple):
    """What a method finds for one batch; one item per target of the evaluation."""

    totals: Sequence[Totals]
    """For each target and site, contributions shaped like the hidden tensor."""
    baseline_values: Sequence[Float[Tensor, "batch"]] | None
    """T(x₀) of each target, for methods that compare with a baseline."""
    steps: Int[Tensor, "batch"] | None = None
    """Steps of each image's path, where images have paths of their own."""


class Method(ABC):
    """How contributions are computed. Subclass and register it, or name it in a config by import path."""

    complete: ClassVar[bool] = False
    """Whether the contributions of a cut layer add up to T(x) - T(x₀)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A label that is safe in paths."""

    @abstractmethod
    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """Contributions of every site to every target."""

    @property
    def needs_statistics(self) -> bool:
        """Whether it must be fitted to a data set first."""
        return False

    def fitted(self, statistics: DataStatistics) -> "Method":
        """The method with what it needs of a data set; itself if that is nothing."""
        del statistics
        return self


def _import_method(found: Any, name: str) -> Any:
    if isinstance(found, type) and issubclass(found, Method):
        return found
    raise AttributionError(f"attribution method {name!r} is not a subclass of codec_dist.attribution.Method")


METHODS: Registry[Method] = Registry("attribution method", AttributionError, imported=_import_method)


@METHODS.register("integrated_gradients")
class IntegratedGradients(Method):
    """Integrated gradients of hidden units, by the trapezoid rule along the hidden trajectory.

    C = Σ_{i=1..S} ½ (g_{i-1} + g_i) ⊙ (h_i - h_{i-1}) at x_i = x₀ + α_i (x - x₀); also known as layer
    conductance (Dhamdhere, Sundararajan, Yan 2018). S steps cost S evaluations, and one of a single image
    for the baseline if that is the same for all.

    On networks trained on photographs the target changes mostly near the baseline, where uniform points are too far
    apart: with ten, contributions miss most of what they should add up to. Learned points are as many, placed where
    they are needed.

    Args:
        steps: S, at least 1; or ``"auto"``: the fewest whose relative residual is below ``tolerance``, see
            :func:`codec_dist.attribution.choose_path`; default 10, or as many as points are given.
        baseline: x₀: the name of a baseline, one with options ``{"name": "blur", "options": {"sigma": 8}}``, a
            tensor shaped like one image, or a :class:`Baseline`.
        tolerance: the median relative residual that ``"auto"`` aims at, of every cut layer.
        points: α of the path's points: ``"learned"`` on a probe of images, ``"uniform"`` as in the paper,
            ``{"name": "power", "options": {"exponent": 2}}``, or a list of numbers from 0 to 1.
        adaptive: ``{"tolerance": 0.1, "most": 30}``: more points for each image whose relative residual is above the
            tolerance, up to so many steps; None: the same points for all images.
    """

    complete = True

    def __init__(
        self,
        steps: int | str | None = None,
        baseline: str | Mapping[str, Any] | Tensor | Baseline = "zeros",
        tolerance: float = 0.05,
        points: str | Mapping[str, Any] | Sequence[int | float] | PathPoints = "learned",
        adaptive: Mapping[str, Any] | Adaptive | None = None,
    ) -> None:
        self.points, self.adaptive = as_points(points), as_adaptive(adaptive)
        if steps is None:
            steps = len(self.points.values) - 1 if isinstance(self.points, GivenPoints) else DEFAULT_STEPS
        if steps != "auto":
            require_whole("integrated_gradients: steps", steps, least=1, or_else="`auto`")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance > 0:
            raise AttributionError(f"integrated_gradients: tolerance is {tolerance!r}: it must be above 0")
        if steps == 1 and self.learns_points:
            # One step has no points to place.
            self.points = UniformPoints()
        self.steps, self.baseline, self.tolerance = steps, as_baseline(baseline), float(tolerance)
        self._check_points()

    @property
    def name(self) -> str:
        """``integrated_gradients_10``, ``integrated_gradients_auto``."""
        return f"integrated_gradients_{self.steps}"

    @property
    def is_open(self) -> bool:
        """Whether steps or points are still to be chosen."""
        return self.steps == "auto" or self.learns_points

    @property
    def learns_points(self) -> bool:
        """Whether its points are to be learned."""
        return isinstance(self.points, LearnedPoints)

    @property
    def fractions(self) -> Fractions:
        """α of the points that every image's path has.

        Raises:
            AttributionError: they are still to be chosen.
        """
        if not isinstance(self.steps, int):
            raise AttributionError(
                "integrated_gradients: steps are `auto`: choose them with choose_path(attributor, images)"
            )
        return self.points.fractions(self.steps)

    @property
    def most_steps(self) -> int | None:
        """Steps of an image's path at most; None where that is to be chosen."""
        if not isinstance(self.steps, int):
            return None
        return self.steps if self.adaptive is None else max(self.steps, self.adaptive.most)

    def with_steps(self, steps: int) -> "IntegratedGradients":
        """The same method with so many steps."""
        require_whole("integrated_gradients: steps", steps, least=1)
        changed = copy.copy(self)
        changed.steps = steps
        changed._check_points()
        return changed

    def with_points(
        self, points: str | Mapping[str, Any] | Sequence[int | float] | PathPoints
    ) -> "IntegratedGradients":
        """The same method with other points; their number decides the steps where the points are given."""
        changed = copy.copy(self)
        changed.points = as_points(points)
        if isinstance(changed.points, GivenPoints):
            changed.steps = len(changed.points.values) - 1
        changed._check_points()
        return changed

    def with_adaptive(self, adaptive: Mapping[str, Any] | Adaptive | None) -> "IntegratedGradients":
        """The same method with other refinement of each image's path, or none."""
        changed = copy.copy(self)
        changed.adaptive = as_adaptive(adaptive)
        return changed

    @property
    def needs_statistics(self) -> bool:
        """Whether the baseline is of a data set that was not given yet."""
        return self.baseline.needs_statistics

    def fitted(self, statistics: DataStatistics) -> "Method":
        """With the baseline that the data set gives."""
        changed = copy.copy(self)
        changed.baseline = self.baseline.fitted(statistics)
        return changed

    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """Walk from the images down to the baseline, so that targets are chosen where the walk begins."""
        fractions, start = self.fractions, self.baseline.start(images)
        make = path_sum_for(images.device, fused=evaluation.fused)
        batch = len(images)
        if self.adaptive is not None:
            paths = ImagePaths(evaluation, images, start)
            for fraction, point in self._walk(images, at_images, start, fractions, evaluation):
                paths.add(point, fraction)
            end = point
            paths.refine(self.adaptive)
            totals: Sequence[Totals] = paths.totals(make)
            return Contributions(totals, [value.expand(batch) for value in end.targets], paths.steps)
        sums: list[dict[LayerKey, PathSum]] = [{site: make() for site in at_images.hidden} for _ in evaluation.targets]
        for _, point in self._walk(images, at_images, start, fractions, evaluation):
            _add_point(sums, point)
            end = point
        return Contributions([dict(each) for each in sums], [value.expand(batch) for value in end.targets])

    def _walk(
        self, images: Images, at_images: Point, start: Tensor, fractions: Fractions, evaluation: Evaluation
    ) -> Iterator[tuple[float, Point]]:
        """Points of the path with their α, from the images down to the baseline."""
        yield 1.0, at_images
        at_once = evaluation.points_at_once(len(images))
        inner = fractions[-2:0:-1]
        for first in range(0, len(inner), at_once):
            some = inner[first : first + at_once]
            points = evaluation.at(*(start.lerp(images, fraction) for fraction in some))
            yield from zip(some, points, strict=True)
        batch = len(images)
        yield 0.0, evaluation.at_constant(start, batch) if self.baseline.same_for_all else evaluation.at(start)[0]

    def _check_points(self) -> None:
        """Find out now whether the points fit the steps."""
        if not self.is_open:
            _ = self.fractions
        if self.steps == "auto" and isinstance(self.points, GivenPoints):
            raise AttributionError("integrated_gradients: points are given, so steps cannot be `auto`: leave steps out")


def _add_point(sums: Sequence[Mapping[LayerKey, PathSum]], point: Point) -> None:
    for of_target, gradients in zip(sums, point.gradients, strict=True):
        for site, path_sum in of_target.items():
            path_sum.add(point.hidden[site], gradients[site])


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
        return Contributions([self._products(at_images.hidden, slopes) for slopes in at_images.gradients], None)

    def _products(self, hidden: Mapping[LayerKey, Tensor], gradients: Mapping[LayerKey, Tensor]) -> Totals:
        totals: Totals = {}
        for site, values in hidden.items():
            values, slope = widened(values), widened(gradients[site])
            values = _unit(values) if self.normalize == "both" else values
            totals[site] = WholeTotal(values * (slope if self.normalize == "neither" else _unit(slope)))
        return totals


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
        number = isinstance(self.sigma, int | float) and not isinstance(self.sigma, bool)
        if not number or not 0 <= self.sigma < float("inf"):
            raise AttributionError(f"smooth_gradient: sigma is {self.sigma!r}: it must be a number, not below 0")

    @property
    def name(self) -> str:
        """``smooth_gradient_20``."""
        return f"smooth_gradient_{self.samples}"

    def contributions(self, images: Images, at_images: Point, evaluation: Evaluation) -> Contributions:
        """One evaluation per noisy copy, several in one pass where the batch is small."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "smooth_gradient"))
        totals: list[dict[LayerKey, Tensor]] = [{} for _ in evaluation.targets]
        at_once = evaluation.points_at_once(len(images))
        for first in range(0, self.samples, at_once):
            count = min(at_once, self.samples - first)
            noise = [torch.randn(images.shape[1:], generator=generator, dtype=torch.float32) for _ in range(count)]
            for point in evaluation.at(*(images + self.sigma * each.to(images) for each in noise)):
                self._add(totals, point)
        return Contributions([{site: WholeTotal(values) for site, values in each.items()} for each in totals], None)

    def _add(self, totals: list[dict[LayerKey, Tensor]], point: Point) -> None:
        for of_target, gradients in zip(totals, point.gradients, strict=True):
            for site, hidden in point.hidden.items():
                product = widened(hidden) * widened(gradients[site]) / self.samples
                of_target[site] = of_target[site].add_(product) if site in of_target else product


def _unit(tensor: Tensor) -> Tensor:
    """Each sample divided by its norm over everything; zero stays zero."""
    norm = tensor.flatten(1).norm(dim=1).clamp_min(torch.finfo(tensor.dtype).tiny)
    return tensor / norm.reshape(-1, *[1] * (tensor.ndim - 1))
