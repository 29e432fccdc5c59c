"""Whether a faster form of a model computes what the model itself computes, tried on real inputs before it is used.

Two passes of the plain model find networks that are random in evaluation mode. A form is then compared with the plain
model on a batch of two images and on the first of them alone: outputs, hidden values and gradients of every site.
Rounding differs between forms, and a ReLU at its kink can turn a rounding error into a large one of the gradient. So
what differs by more than a first, narrow tolerance is looked at again: it counts only if it also exceeds what a
rounding error of the input does to the plain model, and does so on each of several inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.capture import Captured, borrowed, checked_output, edited, widened
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.image_memory import is_out_of_memory
from codec_dist.models import LayerKey, model_call, reason_of
from codec_dist.utils import CodecError

Images = Float[Tensor, "batch ..."]
Run = Callable[[Images], Captured]
Form = Callable[[], AbstractContextManager[Run]]

# Differences that need no second look, in units of the rounding error of one operation; gradients have kinks.
VALUE_ROUNDINGS, GRADIENT_ROUNDINGS = 1e3, 1e4
# Types so narrow that this many roundings are more than the number itself.
WIDEST_VALUE, WIDEST_GRADIENT = 0.06, 0.12
# What the plain model does to a rounding error of its input, times this, is still rounding.
NOISE_FACTOR = 16.0
# Inputs on which a difference must show, and passes of a network that draws random numbers until it is taken as fixed.
INPUTS, RANDOM_PASSES = 3, 8


@dataclass(frozen=True)
class Optimizations:
    """What makes a model faster while it is explained, each of which a model may not be fit for.

    Attributes:
        inplace: modules that work in place go on doing so; else they are made to write elsewhere.
        fold_batchnorm: BatchNorms are folded into the convolutions before them.
        channels_last: 2-d convolutions compute in that memory format.
        fused: on a GPU one kernel sums a path's contributions.
    """

    inplace: bool = True
    fold_batchnorm: bool = True
    channels_last: bool = True
    fused: bool = True


class Pass(NamedTuple):
    """One forward and backward pass.

    Attributes:
        output: [batch, outputs].
        hidden: the tensor of each site.
        gradients: those of a fixed random sum of the outputs, alike.
    """

    output: Float[Tensor, "batch outputs"]
    hidden: dict[LayerKey, Tensor]
    gradients: dict[LayerKey, Tensor]

    def first(self) -> "Pass":
        """What it says of the first image."""
        return self._each(lambda tensor: tensor[:1])

    def reversed(self) -> "Pass":
        """The same with the images in the other order."""
        return self._each(lambda tensor: tensor.flip(0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Pass":
        hidden, gradients = (
            {site: change(tensor) for site, tensor in each.items()} for each in (self.hidden, self.gradients)
        )
        return Pass(change(self.output), hidden, gradients)


class Difference(NamedTuple):
    """How far one tensor of two passes is apart.

    Attributes:
        what: for example ``the gradients at layer layer1.0``.
        relative: largest over the images: norm of the difference over the norm of what was expected.
        gradient: whether it is a gradient.
    """

    what: str
    relative: float
    gradient: bool

    def __str__(self) -> str:
        return f"{self.what} differ by {100 * self.relative:.2g} % of their norm"


class FormError(Exception):
    """A form in which the model does not run; the message says what it raises."""


class SelfCheck:
    """Compares forms of a model with the model itself.

    Args:
        model: in any state; it is left as it was.
        sites: where hidden values and gradients are compared.
        images: two, on the model's device and of its type.
        autocast: type in which the model computes where autocast allows.

    Raises:
        AttributionError: the output is not [batch, outputs].
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[LayerKey], images: Images, autocast: torch.dtype | None = None
    ) -> None:
        self._model, self._sites, self._autocast = model, tuple(sites), autocast
        # The images, and others close by, at which other ReLUs are at their kinks.
        self._inputs = [images, *(with_noise(images, 0.1, seed) for seed in range(1, INPUTS))]
        self._rounding = torch.finfo(autocast or images.dtype).eps
        self._tolerances = {
            False: min(VALUE_ROUNDINGS * self._rounding, WIDEST_VALUE),
            True: min(GRADIENT_ROUNDINGS * self._rounding, WIDEST_GRADIENT),
        }
        self._mixes = False
        self._together: dict[int, Pass] = {0: self._plain_pass(images)}
        self._alone: dict[int, Pass] = {}
        self._noise: dict[int, dict[str, float]] = {}

    def points(self, site: LayerKey) -> list[tuple[Tensor, Tensor]]:
        """Hidden values and gradients at the two images, then at the first for both: a path of two points."""
        both = self._together[0]
        return [(each.hidden[site], each.gradients[site]) for each in (both, both.first())]

    def randomness(self) -> str | None:
        """What differs between two passes of the same images, as a sentence; None: nothing does.

        A network that drew random numbers and still gave the same twice is run some times more.
        """
        difference, drew = self._repeated(seed=1)
        if difference is None and drew:
            others = (self._repeated(seed)[0] for seed in range(2, RANDOM_PASSES))
            difference = next((each for each in others if each is not None), None)
        return None if difference is None else f"{difference} in two passes of the same images"

    def find_mixing(self) -> str | None:
        """What of an image changes when another one passes beside it, as a sentence; None: nothing does.

        From then on an image alone is compared with the plain model's pass of it alone.
        """
        found = self._least(lambda number: self._excesses(number, self._plain_variants(number)))
        self._mixes = found is not None
        return None if found is None else f"{found} where another image passes beside or before the same one"

    def disagreement(self, form: Form) -> str | None:
        """Where a form of the model does not compute what the model itself does, as a sentence; None: nowhere.

        Args:
            form: on entry gives a function that runs the model in that form.
        """
        try:
            passes = self._passes(form, 0)
            if all(each.relative <= self._tolerances[each.gradient] for each in self._differences(0, passes)):
                return None
            found = self._least(lambda number: self._excesses(number, self._passes(form, number) if number else passes))
        except FormError as error:
            return str(error)
        return None if found is None else f"{found} from the plain model's"

    def _passes(self, form: Form, number: int) -> list[tuple[Pass, bool]]:
        """Passes of both images of an input and of the first alone, and whether it was alone.

        The two pass in the other order, unless the plain model itself mixes them: a network in which an image
        depends on those before it is not found by the first one alone.
        """
        images = self._inputs[number]
        try:
            with form() as run:
                both = self._run(run, images) if self._mixes else self._run(run, images.flip(0)).reversed()
                return [(both, False), (self._run(run, images[:1]), True)]
        except CodecError:
            raise
        except Exception as error:
            # Whatever the model raises in this form: the plain one has run.
            if is_out_of_memory(error):
                raise
            raise FormError(f"the model raises {type(error).__name__}: {reason_of(error)}") from error

    def _plain_variants(self, number: int) -> list[tuple[Pass, bool]]:
        """The plain model's passes of both images in the other order and of the first alone."""
        both = self._plain_pass(self._inputs[number].flip(0)).reversed()
        return [(both, False), (self._plain_alone(number), True)]

    def _differences(self, number: int, passes: Iterable[tuple[Pass, bool]]) -> list[Difference]:
        together, differences = self._plain_together(number), []
        for found, alone in passes:
            expected = together
            if alone:
                expected = self._plain_alone(number) if self._mixes else together.first()
            differences += compare(found, expected)
        return differences

    def _excesses(self, number: int, passes: Iterable[tuple[Pass, bool]]) -> list[tuple[float, Difference]]:
        """Each difference from the plain model on one input, and how many times what rounding explains it is."""
        if number not in self._noise:
            noisy = self._plain_pass(with_noise(self._inputs[number], 4 * self._rounding, INPUTS))
            differences = compare(noisy, self._plain_together(number))
            self._noise[number] = {each.what: each.relative for each in differences}
        noise = self._noise[number]
        return [
            (each.relative / (self._tolerances[each.gradient] + NOISE_FACTOR * noise[each.what]), each)
            for each in self._differences(number, passes)
        ]

    def _least(self, excesses: Callable[[int], list[tuple[float, Difference]]]) -> Difference | None:
        """The largest difference that shows on every input; what shows on some of them only is a kink."""
        least = excesses(0)
        for number in range(1, INPUTS):
            if any(excess > 1 for excess, _ in least):
                least = [min(pair, key=lambda entry: entry[0]) for pair in zip(least, excesses(number), strict=True)]
        excess, worst = max(least, key=lambda entry: entry[0])
        return worst if excess > 1 else None

    def _repeated(self, seed: int) -> tuple[Difference | None, bool]:
        """What differs in one more pass of the images, and whether the model drew random numbers."""
        images, expected = self._inputs[0], self._together[0]
        with torch.random.fork_rng(devices=_devices(images)), torch.no_grad(), self._plain_form() as run:
            torch.manual_seed(seed)
            before = _generator_state(images)
            with self._precision(images):
                output, hidden = run(images)
            drew = not torch.equal(before, _generator_state(images))
        found = Pass(widened(checked_output(output, len(images))), hidden, expected.gradients)
        differences = (each for each in compare(found, expected) if each.relative > self._tolerances[False])
        return next(differences, None), drew

    def _plain_together(self, number: int) -> Pass:
        if number not in self._together:
            self._together[number] = self._plain_pass(self._inputs[number])
        return self._together[number]

    def _plain_alone(self, number: int) -> Pass:
        if number not in self._alone:
            self._alone[number] = self._plain_pass(self._inputs[number][:1])
        return self._alone[number]

    def _plain_pass(self, images: Images) -> Pass:
        with self._plain_form() as run:
            return self._run(run, images)

    def _run(self, run: Run, images: Images) -> Pass:
        """A forward pass and the gradients of a fixed random sum of its outputs, from one state of the generator."""
        with torch.random.fork_rng(devices=_devices(images)), self._precision(images):
            torch.manual_seed(0)
            output, hidden = run(images)
        output = widened(checked_output(output, len(images)))
        generator = torch.Generator().manual_seed(0)
        total = (output * torch.randn(output.shape[1], generator=generator).to(output)).sum()
        found: Sequence[Tensor | None] = [None] * len(hidden)
        if total.requires_grad:
            with model_call("gradients were computed"):
                found = torch.autograd.grad(total, list(hidden.values()), allow_unused=True)
        # Whether a layer leads to the output is for others to say.
        slopes = [torch.zeros_like(each) if slope is None else slope for each, slope in zip(hidden.values(), found)]
        hidden = {site: tensor.detach() for site, tensor in hidden.items()}
        return Pass(output.detach(), hidden, dict(zip(hidden, slopes, strict=True)))

    @contextmanager
    def _plain_form(self) -> Iterator[Run]:
        """The model as it is, in evaluation mode; hidden tensors are copies, which nothing can overwrite."""
        hidden: dict[LayerKey, Tensor] = {}

        def keep(site: LayerKey, tensor: Tensor) -> Tensor:
            hidden[site] = tensor.clone()
            if torch.is_grad_enabled() and not tensor.requires_grad:
                hidden[site].requires_grad_()
            return hidden[site].clone()

        def run(images: Images) -> Captured:
            hidden.clear()
            with model_call(f"it computed images of {list(images.shape)}"):
                return Captured(self._model(images.clone()), dict(hidden))

        with borrowed(self._model), edited(self._model, {site: partial(keep, site) for site in self._sites}):
            yield run

    def _precision(self, images: Images) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(images.device.type, self._autocast)


def compare(found: Pass, expected: Pass) -> list[Difference]:
    """How far two passes of the same images are apart: output, hidden values, gradients."""
    differences = [Difference("the outputs", _relative(found.output, expected.output), False)]
    for site, values in expected.hidden.items():
        differences.append(Difference(f"the values at layer {site}", _relative(found.hidden[site], values), False))
    for site, slopes in expected.gradients.items():
        differences.append(Difference(f"the gradients at layer {site}", _relative(found.gradients[site], slopes), True))
    return differences


def two_images(images: Images) -> Float[Tensor, "two ..."]:
    """The first two images; where there is one, a changed copy of it is the second."""
    if len(images) > 1:
        return images[:2]
    return torch.cat([images, with_noise(images.flip(-1), 0.1, 0)])


def with_noise(images: Images, sigma: float, seed: int) -> Images:
    """Gaussian noise added, of ``sigma`` times the standard deviation of each image; of 1 where that is 0."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32).to(images)
    spread = images.flatten(1).std(dim=1, correction=0)
    spread = torch.where(spread > 0, spread, 1.0).reshape(-1, *[1] * (images.ndim - 1))
    return images + sigma * spread * noise


def fastest_agreeing(
    requested: Optimizations, disagreement: Callable[[Optimizations], str | None]
) -> tuple[Optimizations, dict[str, str]]:
    """The requested optimisations that leave a model's numbers as they are, and why the others do not.

    Args:
        requested: what is wanted.
        disagreement: what is wrong with a set of optimisations; None: nothing.

    Returns:
        The largest set, built one by one, and for each optimisation that was left out what is wrong with it.

    Raises:
        AttributionError: the model's numbers are not had even without any.
    """
    if disagreement(requested) is None:
        return requested, {}
    kept = replace(requested, inplace=False, fold_batchnorm=False, channels_last=False)
    if (reason := disagreement(kept)) is not None:
        raise AttributionError(
            f"this model cannot be explained: with its hidden tensors captured, {reason}; choose other layers"
        )
    left_out = {}
    for name in ("inplace", "fold_batchnorm", "channels_last"):
        if getattr(requested, name):
            tried = replace(kept, **{name: True})
            reason = disagreement(tried)
            if reason is None:
                kept = tried
            else:
                left_out[name] = reason
    return kept, left_out


def _relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, for the image where that is largest."""
    if found.shape != expected.shape:
        return float("inf")
    kind = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(kind).flatten(1), expected.to(kind).flatten(1)
    if torch.equal(found, expected):
        return 0.0
    norms = expected.norm(dim=1)
    # An image to which a layer says next to nothing is measured by the others.
    largest = float(norms.nan_to_num(0.0, posinf=0.0).max())
    norms = norms.clamp_min(max(1e-3 * largest, torch.finfo(kind).tiny))
    ratios = (found - expected).norm(dim=1) / norms
    # What is not finite in the plain model either is for the engine to name.
    ratios = torch.where(expected.isfinite().all(dim=1), ratios.nan_to_num(torch.inf), 0.0)
    return float(ratios.max())


def _devices(images: Tensor) -> list[int]:
    return [images.device.index or 0] if images.is_cuda else []


def _generator_state(images: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(images.device) if images.is_cuda else torch.get_rng_state()
