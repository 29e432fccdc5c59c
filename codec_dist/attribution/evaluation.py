"""One model, some layers and some targets, evaluated at points of the input space."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.capture import Captured, checked_output, widened
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.targets import Target, named_errors
from codec_dist.models import LayerKey, model_call

# Gradients of float16 networks are computed of the target times this, so that small ones do not vanish.
FLOAT16_SCALE = 2.0**12

Images = Float[Tensor, "batch ..."]


@dataclass
class Point:
    """What is known at one point x of the input space, for a batch.

    Attributes:
        output: the model's output, detached; half-precision values are widened to float32.
        targets: T(x) of each target, detached.
        hidden: h of each site, in the type in which the model computes.
        gradients: for each target, ∂T/∂h of each site, shaped like ``hidden``.
    """

    output: Float[Tensor, "batch outputs"]
    targets: tuple[Float[Tensor, "batch"], ...]
    hidden: dict[LayerKey, Tensor]
    gradients: tuple[dict[LayerKey, Tensor], ...]


class Evaluation:
    """Evaluates points for one batch at a time; begin each batch with :meth:`begin`.

    Args:
        run: runs the model; returns its output and the hidden tensors.
        targets: the forward pass is shared by all; each has a backward pass of its own.
        autocast: type in which the model computes where autocast allows; None: its own.
        largest: samples, times points, that may pass through the model at once; None: any number.
        fill: samples, times points, that should pass at once where ``largest`` is None.
        fused: whether a GPU's fused kernel may sum contributions.
        mixes: whether the model mixes the images of a batch: then points pass one by one, each with its whole batch.
        cuts: the sites that are cut layers.
    """

    def __init__(
        self,
        run: Callable[[Images], Captured],
        targets: Sequence[Target],
        autocast: torch.dtype | None = None,
        largest: int | None = None,
        fill: int = 1,
        *,
        fused: bool = True,
        mixes: bool = False,
        cuts: Sequence[LayerKey] = (),
    ) -> None:
        self.targets, self.largest, self.fused, self.cuts = tuple(targets), largest, fused, tuple(cuts)
        self._fill, self._mixes = fill, mixes
        self._run, self._autocast = run, autocast
        self._choices: list[Int[Tensor, "batch chosen"] | None] = [None] * len(self.targets)
        self._constant: tuple[Tensor, Point] | None = None

    def points_at_once(self, batch: int) -> int:
        """How many points of a batch pass through the model together."""
        return 1 if self._mixes else max(1, (self.largest or self._fill) // batch)

    def begin(self, images: Images, labels: Int[Tensor, "batch"] | None) -> Point:
        """The point at the images themselves, where targets that stay fixed along the path are chosen."""
        return self._evaluate(images, 1, labels, choose=True)[0]

    def at(self, *inputs: Images) -> list[Point]:
        """Points at other inputs for the same batch, all in one pass."""
        return self._evaluate(torch.cat(inputs) if len(inputs) > 1 else inputs[0], len(inputs))

    def at_rows(self, inputs: Float[Tensor, "rows ..."], rows: Int[Tensor, "rows"]) -> Point:
        """The point at other inputs for some images of the batch, in one pass."""
        whole = self._choices
        try:
            self._choices = [None if choice is None else choice[rows] for choice in whole]
            return self._evaluate(inputs, 1)[0]
        finally:
            self._choices = whole

    def input_gradients(
        self, inputs: Images
    ) -> tuple[tuple[Float[Tensor, "batch"], ...], tuple[Float[Tensor, "batch ..."], ...]]:
        """Value and gradient of each target with respect to the input itself, at other inputs for the same batch."""
        inputs = inputs.detach().requires_grad_()
        with self._precision(inputs.device):
            output = self._run(inputs).output
        output = widened(checked_output(output, len(inputs)))
        values = [self._value(target, output, choice) for target, choice in zip(self.targets, self._choices)]
        site = LayerKey("input")
        slopes = [self._gradients(value, {site: inputs}, keep=value is not values[-1])[site] for value in values]
        return tuple(value.detach() for value in values), tuple(slopes)

    def at_constant(self, image: Float[Tensor, "one ..."], batch: int) -> Point:
        """The point at one input for all samples: a batch of one, run once, if all have the same targets."""
        if self._mixes or any(choice is not None for choice in self._choices):
            return self.at(image.expand(batch, *image.shape[1:]))[0]
        if self._constant is None or not torch.equal(self._constant[0], image):
            self._constant = image, self.at(image)[0]
        return self._constant[1]

    def where_not_finite(self, image: Float[Tensor, "one ..."]) -> str | None:
        """The first place in a forward pass that is not finite, as the beginning of a sentence; None: all is."""
        with torch.no_grad(), self._precision(image.device):
            output, hidden = self._run(image)
        if not image.isfinite().all():
            return "its pixels are"
        for site, values in hidden.items():
            if not values.isfinite().all():
                return f"layer {site} and what follows are"
        return None if output.isfinite().all() else "the model's output is"

    def _evaluate(self, inputs: Images, copies: int, labels: Tensor | None = None, choose: bool = False) -> list[Point]:
        with self._precision(inputs.device):
            output, hidden = self._run(inputs)
        output = widened(checked_output(output, inputs.shape[0]))
        if choose:
            self._choices = []
            for target in self.targets:
                with named_errors(target):
                    self._choices.append(target.choose(output.detach(), labels))
        values = [self._value(target, output, choice) for target, choice in zip(self.targets, self._choices)]
        gradients = [self._gradients(value, hidden, keep=value is not values[-1]) for value in values]
        parts = {site: tensor.detach().chunk(copies) for site, tensor in hidden.items()}
        slopes = [{site: tensor.chunk(copies) for site, tensor in each.items()} for each in gradients]
        outputs, scalars = output.detach().chunk(copies), [value.detach().chunk(copies) for value in values]
        return [
            Point(
                outputs[copy],
                tuple(each[copy] for each in scalars),
                {site: pieces[copy] for site, pieces in parts.items()},
                tuple({site: pieces[copy] for site, pieces in each.items()} for each in slopes),
            )
            for copy in range(copies)
        ]

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)

    def _value(self, target: Target, output: Tensor, choice: Tensor | None) -> Float[Tensor, "batch"]:
        if choice is not None and len(choice) != len(output):
            choice = choice.repeat(len(output) // len(choice), 1)
        with named_errors(target):
            value = target.value(output, choice)
        if not isinstance(value, Tensor) or value.shape != output.shape[:1]:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise AttributionError(
                f"target {target.name} returns {found} for an output of {list(output.shape)}: one number per sample, "
                f"[{len(output)}], is needed"
            )
        return value

    def _gradients(self, target: Tensor, hidden: dict[LayerKey, Tensor], keep: bool) -> dict[LayerKey, Tensor]:
        """∂T/∂h of each site. In evaluation mode samples do not mix, so the batch's sum serves all at once."""
        scale = FLOAT16_SCALE if self._autocast == torch.float16 else None
        found: tuple[Tensor | None, ...] = (None,) * len(hidden)
        if target.requires_grad:
            total = target.sum() if scale is None else target.sum() * scale
            with model_call("gradients were computed"):
                found = torch.autograd.grad(total, list(hidden.values()), allow_unused=True, retain_graph=keep)
        gradients = {}
        for site, gradient in zip(hidden, found, strict=True):
            if gradient is None:
                raise AttributionError(
                    f"layer {site} does not influence the target: no gradient reaches it; choose a layer that lies "
                    "between the input and the output"
                )
            gradients[site] = gradient if scale is None else gradient.float() / scale
        return gradients
