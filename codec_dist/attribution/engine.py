"""The engine: from a batch of images to contributions per channel of the chosen layers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution.batch import BatchTotals, LayerSettings, check_finite, explain
from codec_dist.attribution.errors import AttributionError, NotFiniteError, require_whole
from codec_dist.attribution.evaluation import Evaluation
from codec_dist.attribution.explained_model import AUTOCAST, ExplainedModel
from codec_dist.attribution.fast_model import laid_out
from codec_dist.attribution.image_memory import (
    FILL_BYTES,
    SPARE_FACTOR,
    affordable,
    check_budget,
    evenly,
    is_out_of_memory,
)
from codec_dist.attribution.interval_errors import IntervalErrors, affordable_bytes, measure_intervals
from codec_dist.attribution.methods import IntegratedGradients, Method
from codec_dist.attribution.path_choice import PathChoice, choose_path
from codec_dist.attribution.path_sums import can_fuse
from codec_dist.attribution.reductions import make_reduction
from codec_dist.attribution.results import AttributionResult, concatenate
from codec_dist.attribution.self_check import Optimizations, two_images
from codec_dist.attribution.targets import Target, TopK
from codec_dist.models import resolve_layers

Images = Float[Tensor, "batch ..."]
Labels = Int[Tensor, "labels"]

Finished = TypeVar("Finished")

# Images of the first batch on which points of the path are chosen.
PROBE_IMAGES = 32


class Attributor:
    """Computes contributions of hidden units to one or several targets, for batches of images.

    The model may be in any state; it is explained in evaluation mode with frozen parameters, and is exactly
    as before after every call, also after an error. Its weights may change between calls, its structure
    may not.

    Args:
        model: any module whose output is [batch, outputs].
        layers: layer keys, globs or presets (see :func:`codec_dist.models.resolve_layers`).
        method: default integrated gradients with 10 steps from zero, whose points are learned on the first images
            of the first call.
        target: default the largest output, chosen again at every path point. Several targets share the forward
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
        optimizations: what makes this model faster and leaves its numbers as they are, where that was found out
            before; then it is not looked at again, nor are the next two. By default it is found out at the first
            call: what disagrees with the plain model beyond rounding is not used, and a warning is logged.
        allow_random: explain a network that draws random numbers in evaluation mode.
        allow_mixing: explain a network in which the images of a batch influence each other.
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
        optimizations: Optimizations | None = None,
        allow_random: bool = False,
        allow_mixing: bool = False,
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
        self.path_choice: PathChoice | None = None
        self.microbatch = self._given_microbatch = microbatch
        self._memory, self._halve = memory, halve
        # Images times points that pass together where no microbatch is given.
        self._fill = 1
        self._allow_mixing = allow_mixing
        reductions = {key: make_reduction(model, key) for key in self.keys}
        self._settings = LayerSettings(reductions, activations, gradients)
        _refuse_equal_names(self.targets)
        self._explained = ExplainedModel(
            model,
            self.keys,
            self._settings,
            optimizations or Optimizations(fold_batchnorm=fold_batchnorm, channels_last=channels_last),
            checked=optimizations is not None,
            autocast=autocast,
            allow_random=allow_random,
            allow_mixing=allow_mixing,
        )

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
        if not self._explained.channels:
            raise AttributionError("channels are known after the first call: call probe(images[:1]) before")
        return dict(self._explained.channels)

    @property
    def cuts(self) -> dict[str, bool]:
        """Whether each layer is a cut, so that its contributions have a completeness residual."""
        if not self._explained.channels:
            raise AttributionError("cut layers are known after the first call: call probe(images[:1]) before")
        return {str(key): self._settings.cuts[key.site] for key in self.keys}

    @property
    def optimizations(self) -> Optimizations:
        """What makes the model faster and leaves its numbers as they are; known after the first call or :meth:`probe`.

        Raises:
            AttributionError: nothing has been run yet.
        """
        if not self._explained.channels:
            raise AttributionError("optimizations are known after the first call: call probe(images[:2]) before")
        return self._explained.optimizations

    @property
    def left_out(self) -> dict[str, str]:
        """For each optimisation that the self-check switched off, how the model's numbers differ with it."""
        return dict(self._explained.left_out)

    def with_method(self, method: Method) -> "Attributor":
        """The same engine with another method; what was found out about the model is kept."""
        changed = copy.copy(self)
        changed.method, changed.path_choice = method, None
        changed._explained = self._explained.copy()
        changed.microbatch = self._given_microbatch
        return changed

    def bytes_per_image(self, device: str, *, steps: int | None = None) -> int:
        """Memory that each image of a microbatch takes while it passes, on a device of the type ``device``.

        Args:
            device: ``cpu`` or ``cuda``, wherever the model is now. A GPU keeps all points of the path at once, and
                where paths are refined so does a CPU.
            steps: steps of the path at most; default: the method's.

        Raises:
            AttributionError: nothing has been run yet.
        """
        if not self._explained.channels:
            raise AttributionError("what an image takes is known after the first call: call probe(images[:1]) before")
        points = self._kept_points(keeps_all=device == "cuda", steps=steps)
        return int(SPARE_FACTOR * self._explained.footprint.bytes(len(self.targets), points))

    def probe(self, images: Images) -> dict[str, int]:
        """Run the model on the first two images, find out what it is like, and return the channels of each layer.

        Raises:
            AttributionError: a layer is not reached, is called twice, is not one tensor, or does not have
                the shape that its reduction needs; the output is not [batch, outputs]; the network is random in
                evaluation mode, or mixes the images of a batch, and that is not allowed.
        """
        if not self._explained.channels:
            with torch.inference_mode(False), torch.enable_grad():
                self._explained.inspect(two_images(self._prepared(images[:2])).contiguous())
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
        self._calibrate(images, labels)

        def reduce(evaluation: Evaluation, totals: BatchTotals, first: int) -> AttributionResult:
            result = totals.result()
            check_finite(evaluation, totals.images, result, first)
            return result

        return concatenate(self._batches(images, labels, reduce))

    def interval_errors(
        self, images: Images, fractions: Sequence[float], labels: Labels | None = None
    ) -> IntervalErrors:
        """How far contributions miss their sum between any two points of a dense path, for each image.

        Costs an evaluation of every point for every image, or several where much is to be kept (see
        :func:`codec_dist.attribution.interval_errors.measure_intervals`).

        Args:
            images: as in a call.
            fractions: α of the points, ascending from 0 to 1.
            labels: as in a call.

        Returns:
            Errors at every cut layer; at the images themselves, where no chosen layer is a cut.

        Raises:
            AttributionError: as a call; or the method has no path.
        """
        if not isinstance(self.method, IntegratedGradients):
            raise AttributionError(f"the method {self.method.name} has no path whose intervals could have errors")
        self.probe(images)
        sites = {key.site: str(key) for key in self.keys if self._settings.cuts[key.site]}
        with self._ready(images, labels) as (evaluation, images, labels):
            start, kept = self.method.baseline.start(images), affordable_bytes(images.device)
            while True:
                try:
                    return measure_intervals(evaluation, images, labels, start, fractions, sites, kept)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._lower(evaluation, 1, images.device, error)
                    kept //= 2
                    if images.is_cuda:
                        torch.cuda.empty_cache()

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
        self._calibrate(images, labels)
        if missing := [layer for layer in channels if layer not in self.layers]:
            raise AttributionError(f"maps of layer {missing[0]!r}: this engine explains {', '.join(self.layers)}")
        for layer, selected in channels.items():
            known = self._explained.channels[layer]
            if not selected or not 0 <= min(selected) <= max(selected) < known:
                raise AttributionError(f"maps of channels {list(selected)} of layer {layer}: it has {known}, from 0")
        parts = self._batches(images, labels, lambda evaluation, totals, first: totals.maps(channels))
        return {layer: torch.cat([part[layer] for part in parts]) for layer in channels}

    def _calibrate(self, images: Images, labels: Labels | None) -> None:
        """Find out about the model, and choose the path's points if that is left to the engine."""
        if labels is not None and len(labels) != len(images):
            raise AttributionError(f"{len(labels)} labels were given for {len(images)} images")
        self.probe(images)
        self._check_path()
        if isinstance(self.method, IntegratedGradients) and self.method.is_open:
            some = None if labels is None else labels[:PROBE_IMAGES]
            try:
                # Another engine: what memory the dense path takes is not what a call takes.
                self.path_choice = choose_path(self.with_method(self.method), images[:PROBE_IMAGES], some)
            except NotFiniteError:
                # A path of one step tells which layer it is.
                self.with_method(self.method.with_points((0.0, 1.0)).with_adaptive(None))(images, labels)
                raise
            self.method = self.method.with_points(self.path_choice.fractions)

    def _check_path(self) -> None:
        """Refuse to refine paths where nothing tells their errors, or where images do not have paths of their own."""
        if not isinstance(self.method, IntegratedGradients):
            return
        if self._allow_mixing and (self.method.learns_points or self.method.adaptive is not None):
            setting = "points `learned`" if self.method.learns_points else "adaptive"
            raise AttributionError(
                f"integrated_gradients: {setting} need images that do not influence each other, which allow_mixing "
                "does not ask for: set points to uniform, and leave adaptive out"
            )
        if self.method.adaptive is None:
            return
        if not any(self.cuts.values()):
            raise AttributionError(
                "integrated_gradients: adaptive needs a cut layer, through which every path passes, and none of "
                f"{', '.join(self.layers[:3])} is one: add a layer such as a block's output, or leave adaptive out"
            )

    @contextmanager
    def _ready(self, images: Images, labels: Labels | None) -> Iterator[tuple[Evaluation, Images, Labels | None]]:
        """The model ready to be explained, in its fastest form, and images and labels where it is."""
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            images = self._prepared(images)
            self._size(images.device)
            run = stack.enter_context(self._explained.running())
            evaluation = Evaluation(
                run,
                self.targets,
                self._explained.narrow,
                self.microbatch,
                self._fill,
                fused=self._explained.optimizations.fused,
                mixes=self._allow_mixing,
                cuts=[site for site, cut in self._settings.cuts.items() if cut],
            )
            images = laid_out(images, self._explained.layout(images))
            yield evaluation, images, None if labels is None else labels.to(images.device)

    def _batches(
        self, images: Images, labels: Labels | None, finish: Callable[[Evaluation, BatchTotals, int], Finished]
    ) -> list[Finished]:
        """What ``finish`` makes of one microbatch after another; it also gets the place of the first image."""
        finished: list[Finished] = []
        with self._ready(images, labels) as (evaluation, images, labels):
            first, even = 0, evenly(len(images), self._explained.footprint.recycled(images.device))
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
                    self._lower(evaluation, size, images.device, error)
                    if images.is_cuda:
                        torch.cuda.empty_cache()
                # The next microbatch needs the room of this one.
                totals = None
        return finished

    def _lower(self, evaluation: Evaluation, size: int, device: torch.device, error: BaseException) -> None:
        """Let half as many images pass at once from now on."""
        tried = size * evaluation.points_at_once(size)
        if not self._halve or tried == 1:
            raise AttributionError(
                f"the memory of the {device.type} is too small for {tried} images at once: lower the microbatch, or "
                "choose fewer layers"
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

    def _size(self, device: torch.device) -> None:
        """How many images, or points of a smaller batch, pass at once, where that is not given."""
        if self.microbatch is not None:
            return
        points = self._kept_points(keeps_all=self._explained.optimizations.fused and can_fuse(device))
        needed = self._explained.footprint.bytes(len(self.targets), points)
        fill = FILL_BYTES.get(device.type, 0) // needed
        self._fill = max(1, min(fill, self._explained.footprint.recycled(device) or fill))
        if self._memory is not None:
            self.microbatch = affordable(self._memory, device, needed)

    def _kept_points(self, *, keeps_all: bool, steps: int | None = None) -> int:
        """Points of the path whose h and g are kept until the sum is taken; 0: none but the last."""
        method = self.method
        if not isinstance(method, IntegratedGradients) or not (keeps_all or method.adaptive):
            return 0
        most = method.most_steps if steps is None else steps
        # Where images have points of their own, their sums are running ones beside the points.
        return 0 if most is None else most + (3 if method.adaptive else 1)


def _refuse_equal_names(targets: Sequence[Target]) -> None:
    if not targets:
        raise AttributionError("no target is given: give one, or leave it out for the largest output")
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AttributionError(f"target {twice[0]} is given twice")
