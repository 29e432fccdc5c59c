"""How many steps integrated gradients need: the fewest whose completeness residual is small enough."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.methods import IntegratedGradients
from codec_dist.attribution.results import AttributionResult, relative_residual

if TYPE_CHECKING:
    from codec_dist.attribution.engine import Attributor

# Numbers of steps that are tried, in turn: every one up to 16, then in growing strides;
# the residual falls about as 1/S, or faster.
LADDER = (*range(1, 17), 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class StepsChoice:
    """What was chosen, and what was measured on the way.

    Attributes:
        steps: the number of steps chosen.
        tolerance: the median relative residual aimed at.
        images: number of images of the probe batch.
        measured: (steps, median relative residual of the worst cut layer and target) of every number tried.
        layer: the worst layer at the chosen number.
    """

    steps: int
    tolerance: float
    images: int
    measured: tuple[tuple[int, float], ...]
    layer: str


def choose_steps(
    attributor: "Attributor", images: Float[Tensor, "batch ..."], labels: Int[Tensor, "batch"] | None = None
) -> StepsChoice:
    """Try more and more steps on a probe batch until the residual of every cut layer is below the tolerance.

    The residual of a layer is the median over the images of r against T(x) - T(x₀), see
    :func:`relative_residual`.

    Args:
        attributor: its method is integrated gradients, whose ``tolerance`` counts; its settings do not change.
        images: the probe batch; 16 to 64 are enough.
        labels: their true classes, where a target needs them.

    Raises:
        AttributionError: another method, no cut layer among those chosen, or a tolerance that the most steps
            do not reach.
    """
    method = attributor.method
    if not isinstance(method, IntegratedGradients):
        raise AttributionError(f"steps are chosen for integrated gradients alone, the method is {method.name}")
    attributor.probe(images)
    if not any(attributor.cuts.values()):
        raise AttributionError(
            "integrated_gradients: steps `auto` need a cut layer, through which every path passes, and none of "
            f"{', '.join(attributor.layers[:3])} is one: add a layer such as a block's output, or give a number"
        )
    measured: list[tuple[int, float]] = []
    for steps in LADDER:
        worst, layer = _worst(attributor.with_method(method.with_steps(steps))(images, labels))
        measured.append((steps, worst))
        if worst < method.tolerance:
            return StepsChoice(steps, method.tolerance, len(images), tuple(measured), layer)
    raise AttributionError(
        f"integrated_gradients: with {steps} steps the median relative residual of layer {layer} is still {worst:.3g}, "
        f"above the tolerance {method.tolerance:g}: raise it, or check that the target changes along the path"
    )


def _worst(result: AttributionResult) -> tuple[float, str]:
    found = (
        (float(relative_residual(layer.completeness, each.target_value, each.baseline_value).median()), name)
        for each in (result, *result.others.values())
        for name, layer in each.items()
        if layer.completeness is not None
    )
    return max(found)
