"""The engine: from a batch of images to contributions per channel of the chosen layers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution.batch import BatchTotals, LayerSettings, check_finite, explain
from codec_dist.attribution.capture import Capture
from codec_dist.attribution.cuts import find_cuts
from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.evaluation import Evaluation
from codec_dist.attribution.folding import FoldPair, find_foldable, prepared, unwatched
from codec_dist.attribution.fused import can_fuse
from codec_dist.attribution.memory import (
    FILL_BYTES,
    Footprint,
    affordable,
    check_budget,
    evenly,
    is_out_of_memory,
    measure_image,
)
from codec_dist.attribution.methods import IntegratedGradients, Method
from codec_dist.attribution.reductions import make_reduction
from codec_dist.attribution.results import AttributionResult, concatenate
from codec_dist.attribution.steps import StepsChoice, choose_steps
from codec_dist.attribution.targets import Target, TopK
from codec_dist.models.layers import resolve_layers

Images = Float[Tensor, "batch ..."]
Labels = Int[Tensor, "labels"]

Finished = TypeVar("Finished")

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Images of the first batch on which `steps: auto` is settled.
PROBE_IMAGES = 32


class Attributor:
    """Computes contributions of hidden units to one or several targets, for batches of images.

    The model may be in any state; it is explained in evaluation mode with frozen parameters, and is exactly
    as before after every call, also after an error. Its weights may change between calls, its structure
    may not.

    Args:
        model: any module whose output is [batch, outputs].
        layers: layer keys, globs or presets (see :func:`codec_dist.models.resolve_layers`).
        method: default integrated gradients with 10 steps from zero.
        target: default the largest output, chosen anew at every path point. Several targets share the forward
            passes; the result is the first one's and holds the ``others``.
        activations: also reduce the hidden tensors at the images.
        gradients: also reduce the gradients at the images.
        microbatch: images that pass through the model at once; default all, on a CPU in equal parts of which
            memory can be used again and again. Where a batch is smaller, as many points of the path pass
            together; by default as many as fill the device well.
        memory: a budget in bytes, or a fraction of the device's memory, that decides the microbatch where
            none is given.
        halve: when memory runs out, halve the microbatch and go on; else it is an error.
        fold_batchnorm: fold every BatchNorm into the convolution before it where no chosen layer lies
            between; changes results by rounding, which ReLUs may magnify.
        channels_last: compute 2-d convolutions in that memory format, by default where the model has any and
            is not of float64; changes results by rounding.
        autocast: ``bfloat16`` or ``float16``: compute in that type where autocast allows, sum in float32.

    Raises:
        ModelError: a layer that the model does not have.
        AttributionError: settings that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        method: Method | None = None,
        target: Target | Sequence[Target] | None = None,
        *,
        activations: bool = False,
        gradients: bool = False,
        microbatch: int | None = None,
        memory: int | float | None = None,
        halve: bool = True,
        fold_batchnorm: bool = True,
        channels_last: bool = True,
        autocast: str | None = None,
    ) -> None:
        if microbatch is not None:
            require_whole("microbatch", microbatch, least=1)
        if memory is not None:
            check_budget(memory)
        if autocast is not None and autocast not in AUTOCAST:
            raise AttributionError(f"autocast is {autocast!r}: use {', '.join(AUTOCAST)}, or none")
        self.model = model
        self.keys = resolve_layers(model, layers)
        self.method = method or IntegratedGradients()
        targets = [TopK()] if target is None else [target] if isinstance(target, Target) else target
        self.targets: tuple[Target, ...] = tuple(targets)
        self.steps_choice: StepsChoice | None = None
        self.microbatch = microbatch
        self._memory, self._halve = memory, halve
        # Images times points that pass together where no microbatch is given.
        self._fill = 1
        self._footprint = Footprint(0, 0, 0)
        self._fold, self._channels_last, self._autocast = fold_batchnorm, channels_last, autocast
        reductions = {key: make_reduction(model, key) for key in self.keys}
        self._settings = LayerSettings(reductions, activations, gradients)
        self._capture = Capture(model, self.keys)
        self._pairs: tuple[FoldPair, ...] = ()
        self._channels: dict[str, int] = {}
        _refuse_equal_names(self.targets)
        _refuse_batch_statistics(model)

    @property
    def target(self) -> Target:
        """The first target, or the only one."""
        return self.targets[0]

    @property
    def layers(self) -> tuple[str, ...]:
        """The resolved layer keys, in the order of the model's modules."""
        return tuple(map(str, self.keys))

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each layer; known after the first call or :meth:`probe`.

        Raises:
            AttributionError: nothing has been run yet.
        """
        if not self._channels:
            raise AttributionError("channels are known after the first call: call probe(images[:1]) before")
        return dict(self._channels)

    @property
    def cuts(self) -> dict[str, bool]:
        """Whether each layer is a cut, so that its contributions have a completeness residual."""
        if not self._channels:
            raise AttributionError("cut layers are known after the first call: call probe(images[:1]) before")
        return {str(key): self._settings.cuts[key.site] for key in self.keys}

    def with_method(self, method: Method) -> "Attributor":
        """The same engine with another method; what was found out about the model is kept."""
        changed = copy.copy(self)
        changed.method, changed.steps_choice = method, None
        return changed

    def probe(self, images: Images) -> dict[str, int]:
        """Run the model on the first image, find out what it is like, and return the channels of each layer.

        Raises:
            AttributionError: a layer is not reached, is called twice, is not one tensor, or does not have
                the shape that its reduction needs; the output is not [batch, outputs].
        """
        if not self._channels:
            with torch.inference_mode(False), torch.enable_grad(), self._capture as capture:
                self._probe(capture, self._prepared(images[:1]).contiguous())
        return self.channels

    def __call__(self, images: Images, labels: Labels | None = None) -> AttributionResult:
        """Contributions for a batch, on the model's device.

        Args:
            images: normalised inputs, [batch, channels, height, width] or whatever the model takes; moved
                to the model's device and type.
            labels: true classes [batch], where a target needs them.

        Raises:
            NotFiniteError: some samples give a NaN or an infinity.
            AttributionError: as :meth:`probe`, or a target that cannot be had from this output.
        """
        self._settle(images, labels)

        def reduce(evaluation: Evaluation, totals: BatchTotals, first: int) -> AttributionResult:
            result = totals.result()
            check_finite(evaluation, totals.images, result, first)
            return result

        return concatenate(self._batches(images, labels, reduce))

    def maps(
        self, images: Images, channels: Mapping[str, Sequence[int]], labels: Labels | None = None
    ) -> dict[str, Float[Tensor, "batch chosen ..."]]:
        """Contributions of some channels at every position, unreduced, for the first target.

        Args:
            images: as in a call.
            channels: for each layer key of this engine, the channels to keep.
            labels: as in a call.

        Returns:
            For each layer [batch, chosen, height, width], or [batch, chosen, positions] where positions are
            tokens (or, for heads, tokens × head dimensions).

        Raises:
            AttributionError: as a call, or a layer or channel that there is not.
        """
        self._settle(images, labels)
        if missing := [layer for layer in channels if layer not in self.layers]:
            raise AttributionError(f"maps of layer {missing[0]!r}: this engine explains {', '.join(self.layers)}")
        for layer, chosen in channels.items():
            if not chosen or not 0 <= min(chosen) <= max(chosen) < self._channels[layer]:
                raise AttributionError(
                    f"maps of channels {list(chosen)} of layer {layer}: it has {self._channels[layer]}, from 0"
                )
        parts = self._batches(images, labels, lambda evaluation, totals, first: totals.maps(channels))
        return {layer: torch.cat([part[layer] for part in parts]) for layer in channels}

    def _settle(self, images: Images, labels: Labels | None) -> None:
        """Find out about the model, and choose the steps if that is left to the engine."""
        if labels is not None and len(labels) != len(images):
            raise AttributionError(f"{len(labels)} labels were given for {len(images)} images")
        self.probe(images)
        if isinstance(self.method, IntegratedGradients) and self.method.steps == "auto":
            some = None if labels is None else labels[:PROBE_IMAGES]
            self.steps_choice = choose_steps(self, images[:PROBE_IMAGES], some)
            self.method = self.method.with_steps(self.steps_choice.steps)

    @contextmanager
    def _ready(self, images: Images, labels: Labels | None) -> Iterator[tuple[Evaluation, Images, Labels | None]]:
        """The model ready to be explained, in its fastest form, and images and labels where it is."""
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            images = self._prepared(images)
            capture = stack.enter_context(self._capture)
            self._size(images.device)
            narrow = AUTOCAST[self._autocast] if self._autocast else None
            channels_last = self._channels_last and images.ndim == 4 and images.dtype != torch.float64
            stack.enter_context(prepared(self.model, unwatched(capture, self._pairs), channels_last, narrow))
            # However the images lay in memory: another layout may give other last bits.
            layout = torch.channels_last if channels_last else torch.contiguous_format
            images = images.contiguous(memory_format=layout)
            evaluation = Evaluation(capture, self.targets, narrow, self.microbatch, self._fill)
            yield evaluation, images, None if labels is None else labels.to(images.device)

    def _batches(
        self, images: Images, labels: Labels | None, finish: Callable[[Evaluation, BatchTotals, int], Finished]
    ) -> list[Finished]:
        """What ``finish`` makes of one microbatch after another; it also gets the place of the first image."""
        finished: list[Finished] = []
        with self._ready(images, labels) as (evaluation, images, labels):
            first, even = 0, evenly(len(images), self._footprint.recycled(images.device))
            while first < len(images):
                size = min(evaluation.largest or even, len(images) - first)
                place = slice(first, first + size)
                some = None if labels is None else labels[place]
                totals: BatchTotals | None
                try:
                    totals = explain(self.method, self._settings, evaluation, images[place], some)
                    finished.append(finish(evaluation, totals, first))
                    first += size
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._lower(evaluation, size, error)
                    if images.is_cuda:
                        torch.cuda.empty_cache()
                # The next microbatch needs the room of this one.
                totals = None
        return finished

    def _lower(self, evaluation: Evaluation, size: int, error: BaseException) -> None:
        """Let half as many images pass at once from now on."""
        tried = size * evaluation.points_at_once(size)
        if not self._halve or tried == 1:
            raise AttributionError(
                f"the memory of the {next(self.model.parameters()).device.type} is too small for {tried} images at "
                "once: lower the microbatch, or choose fewer layers"
            ) from error
        self.microbatch = evaluation.largest = tried // 2

    def _prepared(self, images: Images) -> Images:
        if not len(images):
            raise AttributionError("there are no images in the batch")
        parameter = next(self.model.parameters(), images)
        # Towards a CPU nobody would wait for the end of the copy.
        images = images.detach().to(parameter.device, parameter.dtype, non_blocking=parameter.is_cuda)
        # Tensors made in inference mode cannot take part in a graph.
        return images.clone() if images.is_inference() else images

    def _probe(self, capture: Capture, image: Images) -> None:
        # Two images: a tensor that does not grow with the batch has no row for each.
        with torch.no_grad():
            hidden = capture(torch.cat([image, image])).hidden
        channels = {str(key): self._settings.reduce(key, hidden[key.site], 2)[0].shape[1] for key in self.keys}
        self._settings.cuts = find_cuts(capture, image)
        if self._fold:
            self._pairs = find_foldable(capture, image)
        self._footprint = measure_image(capture, image)
        self._channels = channels

    def _size(self, device: torch.device) -> None:
        """How many images, or points of a smaller batch, pass at once, where that is not given."""
        if self.microbatch is not None:
            return
        steps = getattr(self.method, "steps", None)
        points = steps + 1 if can_fuse(device) and isinstance(steps, int) else 0
        needed = self._footprint.bytes(len(self.targets), points)
        fill = FILL_BYTES.get(device.type, 0) // needed
        self._fill = max(1, min(fill, self._footprint.recycled(device) or fill))
        if self._memory is not None:
            self.microbatch = affordable(self._memory, device, needed)


def _refuse_equal_names(targets: Sequence[Target]) -> None:
    if not targets:
        raise AttributionError("no target is given: give one, or leave it out for the largest output")
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AttributionError(f"target {twice[0]} is given twice")


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise AttributionError(
                f"module {name} normalises over the batch also in evaluation mode (no running statistics): "
                "contributions of one image would depend on the others"
            )
