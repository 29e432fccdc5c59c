"""The path points of integrated gradients, chosen on a probe of images: where they lie, and how many are needed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.errors import AttributionError, NotFiniteError
from codec_dist.attribution.interval_errors import IntervalErrors
from codec_dist.attribution.learned_points import learn_points
from codec_dist.attribution.methods import IntegratedGradients
from codec_dist.attribution.path_points import Fractions, PowerPoints, UniformPoints
from codec_dist.attribution.results import AttributionResult, relative_residual

if TYPE_CHECKING:
    from codec_dist.attribution.engine import Attributor

# Numbers of steps that are tried, in turn: every one up to 16, then in growing strides;
# the residual falls about as 1/S, or faster.
LADDER = (*range(1, 17), 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256)
# The same where points are learned for each, up to nearly all of the dense path's.
LEARNED_LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 60)

# The dense path from which points are learned: its intervals grow with α as the target's change falls. The points
# below the second are left out: they lie within 1/30,000 of the baseline.
DENSE_STEPS, DENSE_EXPONENT, DENSE_FIRST = 64, 3.0, 2
# Twice as many as the steps, up to this number.
MOST_DENSE_STEPS = 128


@dataclass(frozen=True)
class PathChoice:
    """What was chosen, and what was measured on the way.

    Residuals are medians over the images of the relative residual (see :func:`relative_residual`) of the worst cut
    layer and target.

    Attributes:
        fractions: α of the points chosen, from 0 to 1.
        images: number of images of the probe.
        layer: the worst layer; ``input`` stands for the images themselves, where no chosen layer is a cut.
        residual: where points were learned: of images that they were not learned on (see :class:`Learned`); else of
            the probe.
        uniform: of as many uniform points on the probe; None where points are not learned.
        measured: (steps, residual) of every number of steps that was tried.
        tolerance: the residual aimed at, where the number of steps was chosen.
    """

    fractions: Fractions
    images: int
    layer: str
    residual: float
    uniform: float | None = None
    measured: tuple[tuple[int, float], ...] = ()
    tolerance: float | None = None

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.fractions) - 1


def choose_path(
    attributor: "Attributor", images: Float[Tensor, "batch ..."], labels: Int[Tensor, "batch"] | None = None
) -> PathChoice:
    """Choose what a method leaves open: the points, the number of steps, or both.

    Learned points come from one walk over a dense path for each image of the probe (some 70 evaluations), after which
    every choice of its points can be judged without the model. They are never worse than as many uniform points on the
    probe. Steps ``auto`` are the fewest whose residual is below the method's tolerance.

    Args:
        attributor: its method is integrated gradients; its settings do not change.
        images: the probe; 16 to 64 are enough.
        labels: their true classes, where a target needs them.

    Raises:
        AttributionError: another method, nothing to choose, automatic steps without a cut layer among those chosen, or
            a tolerance that the most steps do not reach.
        NotFiniteError: samples of the probe give a NaN or an infinity.
    """
    method = attributor.method
    if not isinstance(method, IntegratedGradients):
        raise AttributionError(f"path points are chosen for integrated gradients alone, the method is {method.name}")
    if not method.is_open:
        raise AttributionError("integrated_gradients: steps and points are given, so there is nothing to choose")
    attributor.probe(images)
    if method.steps == "auto" and not any(attributor.cuts.values()):
        raise AttributionError(
            "integrated_gradients: steps `auto` need a cut layer, through which every path passes, and none of "
            f"{', '.join(attributor.layers[:3])} is one: add a layer such as a block's output, or give a number"
        )
    if not method.learns_points:
        return _fewest_steps(attributor, method, images, labels)
    steps = method.steps if isinstance(method.steps, int) else None
    errors = attributor.interval_errors(images, dense_path(steps), labels)
    if bad := errors.not_finite:
        raise NotFiniteError(f"sample {bad[0]} of the batch: its path is not finite (NaN or infinity)", bad)
    return choose_from(errors, method)


def dense_path(steps: int | None = None) -> Fractions:
    """α of the dense path from which points are learned, with the uniform points of ``steps`` among its points."""
    steps = steps or 0
    cubic = PowerPoints(DENSE_EXPONENT).fractions(
        max(DENSE_STEPS, min(2 * steps, MOST_DENSE_STEPS), steps + DENSE_FIRST)
    )
    # Among so many the nearest ones stand for the others.
    uniform = UniformPoints().fractions(steps) if 0 < steps <= DENSE_STEPS else ()
    return tuple(sorted({0.0, *cubic[DENSE_FIRST:], *uniform}))


def choose_from(errors: IntervalErrors, method: IntegratedGradients) -> PathChoice:
    """Learn the points that a method leaves open, and their number if it is ``auto``, from a dense path's errors.

    Args:
        errors: of the points of :func:`dense_path`, all finite.
        method: its steps and tolerance count.

    Raises:
        AttributionError: the most steps do not reach the tolerance.
    """
    if isinstance(method.steps, int):
        return _learn(errors, method.steps)
    measured: list[tuple[int, float]] = []
    for steps in LEARNED_LADDER:
        choice = _learn(errors, steps)
        measured.append((steps, choice.residual))
        if choice.residual < method.tolerance:
            # The dense path does not hold as many uniform points, which would be compared.
            return replace(choice, uniform=None, measured=tuple(measured), tolerance=method.tolerance)
    raise _not_reached(steps, choice.residual, choice.layer, method.tolerance)


def _learn(errors: IntervalErrors, steps: int) -> PathChoice:
    """Points for a number of steps."""
    learned = learn_points(errors, steps)
    worst = int(learned.expected.argmax())
    return PathChoice(
        tuple(errors.fractions[point] for point in learned.points),
        errors.changes.shape[1],
        str(errors.places[worst]),
        float(learned.expected[worst]),
        float(learned.uniform.max()),
    )


def _fewest_steps(
    attributor: "Attributor",
    method: IntegratedGradients,
    images: Tensor,
    labels: Tensor | None,
) -> PathChoice:
    """Try more and more steps until the residual of every cut layer is below the tolerance."""
    measured: list[tuple[int, float]] = []
    for steps in LADDER:
        tried = method.with_steps(steps).with_adaptive(None)
        worst, layer = _worst(attributor.with_method(tried)(images, labels))
        measured.append((steps, worst))
        if worst < method.tolerance:
            return PathChoice(
                tried.fractions, len(images), layer, worst, measured=tuple(measured), tolerance=method.tolerance
            )
    raise _not_reached(steps, worst, layer, method.tolerance)


def _not_reached(steps: int, residual: float, layer: str, tolerance: float) -> AttributionError:
    return AttributionError(
        f"integrated_gradients: with {steps} steps the median relative residual of layer {layer} is still "
        f"{residual:.3g}, above the tolerance {tolerance:g}: raise it, or check that the target changes along the path"
    )


def _worst(result: AttributionResult) -> tuple[float, str]:
    found = (
        (float(relative_residual(layer.completeness, each.target_value, each.baseline_value).quantile(0.5)), name)
        for each in (result, *result.others.values())
        for name, layer in each.items()
        if layer.completeness is not None
    )
    return max(found)
