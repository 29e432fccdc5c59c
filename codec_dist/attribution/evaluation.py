"""One model, some layers and one target, evaluated at points of the input space."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.capture import Capture
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.targets import Target
from codec_dist.models.layers import LayerKey


@dataclass
class Point:
    """What is known at one point x of the input space, for a batch.

    Attributes:
        output: the model's output, detached; half-precision values are widened to float32.
        target: T(x), detached.
        hidden: h of each site, widened alike.
        gradient: ∂T/∂h of each site, shaped like ``hidden``.
    """

    output: Float[Tensor, "batch outputs"]
    target: Float[Tensor, "batch"]
    hidden: dict[LayerKey, Tensor]
    gradient: dict[LayerKey, Tensor]


class Evaluation:
    """Evaluates points for one batch at a time; begin each batch with :meth:`begin`."""

    def __init__(self, capture: Capture, target: Target) -> None:
        self._capture, self._target = capture, target
        self._choice: Int[Tensor, "batch chosen"] | None = None
        self._constant: Point | None = None

    def begin(self, images: Float[Tensor, "batch ..."], labels: Int[Tensor, "batch"] | None) -> Point:
        """The point at the images themselves, where a target that stays fixed along the path is chosen."""
        return self._evaluate(images, labels, choose=True)

    def at(self, images: Float[Tensor, "batch ..."]) -> Point:
        """The point at other inputs for the same batch."""
        return self._evaluate(images, None, choose=False)

    def at_constant(self, image: Float[Tensor, "one ..."], batch: int) -> Point:
        """The point at one input for all samples: a batch of one, run once, if all have the same target."""
        if self._choice is not None:
            return self.at(image.expand(batch, *image.shape[1:]))
        if self._constant is None:
            self._constant = self.at(image)
        return self._constant

    def _evaluate(self, images: Tensor, labels: Tensor | None, choose: bool) -> Point:
        output, hidden = self._capture(images)
        output = _widened(checked_output(output, images.shape[0]))
        if choose:
            self._choice = self._target.choose(output.detach(), labels)
        target = self._target.value(output, self._choice)
        gradients = _gradients(target, hidden)
        return Point(
            output.detach(),
            target.detach(),
            {site: _widened(tensor.detach()) for site, tensor in hidden.items()},
            {site: _widened(tensor) for site, tensor in gradients.items()},
        )


def checked_output(output: object, batch: int) -> Float[Tensor, "batch outputs"]:
    """The output if it has the form [batch, outputs].

    Raises:
        AttributionError: it has another form.
    """
    if not isinstance(output, Tensor):
        raise AttributionError(f"the model returns a {type(output).__name__}: wrap it to return [batch, outputs]")
    if output.ndim != 2 or output.shape[0] != batch:
        raise AttributionError(
            f"the model's output is {list(output.shape)} for {batch} images: targets need [batch, outputs]"
        )
    return output


def _gradients(target: Tensor, hidden: dict[LayerKey, Tensor]) -> dict[LayerKey, Tensor]:
    """∂T/∂h of each site. In evaluation mode samples do not mix, so the batch's sum serves all at once."""
    found: tuple[Tensor | None, ...] = (None,) * len(hidden)
    if target.requires_grad:
        found = torch.autograd.grad(target.sum(), list(hidden.values()), allow_unused=True)
    gradients = {}
    for site, gradient in zip(hidden, found, strict=True):
        if gradient is None:
            raise AttributionError(f"layer {site} does not influence the target: no gradient reaches it")
        gradients[site] = gradient
    return gradients


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
