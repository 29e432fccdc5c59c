"""The engine: from a batch of images to contributions per channel of the chosen layers."""

from collections.abc import Sequence
from itertools import repeat

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution.capture import Capture
from codec_dist.attribution.cuts import find_cuts
from codec_dist.attribution.errors import AttributionError, NotFiniteError, require_whole
from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.attribution.methods import IntegratedGradients, Method
from codec_dist.attribution.reductions import Split, make_reduction
from codec_dist.attribution.results import AttributionResult, LayerResult, concatenate
from codec_dist.attribution.targets import Target, TopK
from codec_dist.models.layers import LayerKey, resolve_layers

Images = Float[Tensor, "batch ..."]
Labels = Int[Tensor, "batch"]


class Attributor:
    """Computes contributions of hidden units to a target, for batches of images.

    The model may be in any state; it is explained in evaluation mode with frozen parameters, and is exactly
    as before after every call, also after an error. Its weights may change between calls, its structure
    may not.

    Args:
        model: any module whose output is [batch, outputs].
        layers: layer keys, globs or presets (see :func:`codec_dist.models.resolve_layers`).
        method: default integrated gradients with 10 steps from zero.
        target: default the largest output, chosen anew at every path point.
        activations: also reduce the hidden tensors at the images.
        gradients: also reduce the gradients at the images.
        microbatch: images that pass through the model at once; default all.

    Raises:
        ModelError: a layer that the model does not have.
        AttributionError: settings that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        method: Method | None = None,
        target: Target | None = None,
        *,
        activations: bool = False,
        gradients: bool = False,
        microbatch: int | None = None,
    ) -> None:
        if microbatch is not None:
            require_whole("microbatch", microbatch, least=1)
        self.model = model
        self.keys = resolve_layers(model, layers)
        self.method = method or IntegratedGradients()
        self.target = target or TopK()
        self.activations, self.gradients, self.microbatch = activations, gradients, microbatch
        self._reductions = {key: make_reduction(model, key) for key in self.keys}
        self._capture = Capture(model, self.keys)
        self._cuts: dict[LayerKey, bool] = {}
        self._channels: dict[str, int] = {}
        _refuse_batch_statistics(model)

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
        if not self._cuts:
            raise AttributionError("cut layers are known after the first call: call probe(images[:1]) before")
        return {str(key): self._cuts[key.site] for key in self.keys}

    def probe(self, images: Images) -> dict[str, int]:
        """Run the model once on the first image, and return the channels of each layer.

        Raises:
            AttributionError: a layer is not reached, is called twice, is not one tensor, or does not have
                the shape that its reduction needs; the output is not [batch, outputs].
        """
        with torch.inference_mode(False), torch.enable_grad(), self._capture as capture:
            self._probe(capture, self._prepared(images[:1]))
        return self.channels

    def __call__(self, images: Images, labels: Int[Tensor, "labels"] | None = None) -> AttributionResult:
        """Contributions for a batch, on the model's device.

        Args:
            images: normalised inputs, [batch, channels, height, width] or whatever the model takes; moved
                to the model's device and type.
            labels: true classes [batch], where the target needs them.

        Raises:
            NotFiniteError: some samples give a NaN or an infinity.
            AttributionError: as :meth:`probe`, or a target that cannot be had from this output.
        """
        if labels is not None and len(labels) != len(images):
            raise AttributionError(f"{len(labels)} labels were given for {len(images)} images")
        with torch.inference_mode(False), torch.enable_grad(), self._capture as capture:
            images = self._prepared(images)
            if not self._cuts:
                self._probe(capture, images[:1])
            evaluation = Evaluation(capture, self.target)
            size = self.microbatch or len(images)
            chunks = zip(images.split(size), repeat(None) if labels is None else labels.to(images.device).split(size))
            parts = [self._attribute(evaluation, *chunk, first=index * size) for index, chunk in enumerate(chunks)]
        return concatenate(parts)

    def _prepared(self, images: Images) -> Images:
        if not len(images):
            raise AttributionError("there are no images in the batch")
        parameter = next(self.model.parameters(), images)
        images = images.detach().to(parameter.device, parameter.dtype, non_blocking=True)
        # Tensors made in inference mode cannot take part in a graph.
        return images.clone() if images.is_inference() else images

    def _probe(self, capture: Capture, image: Images) -> None:
        with torch.no_grad():
            hidden = capture(image).hidden
        parts = {str(key): self._reduce(key, hidden[key.site])[0] for key in self.keys}
        self._cuts = find_cuts(capture, image)
        self._channels = {layer: positive.shape[1] for layer, positive in parts.items()}

    def _attribute(
        self, evaluation: Evaluation, images: Images, labels: Labels | None, first: int
    ) -> AttributionResult:
        point = evaluation.begin(images, labels)
        prediction, target_value = point.output.argmax(dim=1), point.target
        # Reduced before the method uses the point up.
        at_images = {key: self._beside(key, point) for key in self.keys}
        totals, baseline_value = self.method.contributions(images, point, evaluation)
        residuals: dict[LayerKey, Tensor] = {}
        if self.method.complete and baseline_value is not None:
            change = target_value - baseline_value
            cuts = (site for site, is_cut in self._cuts.items() if is_cut)
            residuals = {site: totals[site].flatten(1).sum(dim=1) - change for site in cuts}
        layers = {}
        for key in self.keys:
            positive, negative = self._reduce(key, totals[key.site])
            layers[str(key)] = LayerResult(positive, negative, **at_images[key], completeness=residuals.get(key.site))
        if baseline_value is None:
            baseline_value = torch.full_like(target_value, torch.nan)
        self._refuse_not_finite(images, target_value, layers, first)
        return AttributionResult(layers, target_value, baseline_value, prediction)

    def _reduce(self, key: LayerKey, values: Tensor) -> Split:
        return self._reductions[key].split(values)

    def _beside(self, key: LayerKey, point: Point) -> dict[str, Tensor]:
        reduced = {}
        if self.activations:
            reduced["activation_positive"], reduced["activation_negative"] = self._reduce(key, point.hidden[key.site])
        if self.gradients:
            reduced["gradient_positive"], reduced["gradient_negative"] = self._reduce(key, point.gradient[key.site])
        return reduced

    def _refuse_not_finite(
        self, images: Images, target_value: Tensor, layers: dict[str, LayerResult], first: int
    ) -> None:
        finite = {"": target_value.isfinite()}
        for name, layer in layers.items():
            quantities = layer.quantities().values()
            finite[name] = torch.stack([values.isfinite().all(dim=1) for values in quantities]).all(dim=0)
        all_finite = torch.stack(list(finite.values())).all(dim=0)
        if all_finite.all():  # the only wait for the device in a batch
            return
        faulty = (~all_finite).nonzero().flatten().tolist()
        samples = [first + index for index in faulty]
        cause = self._where_not_finite(images[faulty[:1]])
        if cause is None:
            name = next(name for name, values in finite.items() if not values[faulty[0]])
            cause = f"the gradients or contributions of layer {name} are" if name else "the target is"
        raise NotFiniteError(f"sample {samples[0]} of the batch: {cause} not finite (NaN or infinity)", samples)

    def _where_not_finite(self, image: Images) -> str | None:
        with torch.no_grad():
            output, hidden = self._capture(image)
        if not image.isfinite().all():
            return "its pixels are"
        for site, values in hidden.items():
            if not values.isfinite().all():
                return f"layer {site} and what follows are"
        return None if output.isfinite().all() else "the model's output is"


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise AttributionError(
                f"module {name} normalises over the batch also in evaluation mode (no running statistics): "
                "contributions of one image would depend on the others"
            )
