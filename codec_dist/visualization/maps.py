"""Mode maps: the pixels through which a mode's top channels move a class's probability."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from codec_dist.attribution import Capture, Traced, make_reduction, needs_trace, trace_layers
from codec_dist.models import LayerKey, model_call, resolve_layers
from codec_dist.visualization.errors import VisualizationError

ChannelNumbers = Sequence[int] | Int[np.ndarray, "chosen"] | Int[Tensor, "chosen"]
Maps = Float[Tensor, "batch colour height width"]

# What was found out of models that are still in use.
_TRACED: "WeakKeyDictionary[nn.Module, dict[LayerKey, Traced | None]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ModeMaps:
    """Maps M = G ⊙ x of a batch of images, in units of the class's probability per unit of the path from zero."""

    net: Maps
    """All units; the sum of the two halves."""
    positive: Maps
    """Units (channel k at position p) whose ⟨J_kp R_kp, x⟩ is above 0."""
    negative: Maps
    """The other units."""


def mode_maps(
    model: nn.Module,
    layer: str,
    images: Maps,
    channels: ChannelNumbers,
    classes: int | Sequence[int] | Int[Tensor, "batch"],
) -> ModeMaps:
    """Mode maps of images for some channels S of a layer h and a class y (docs/method.md §7).

    J = ∂softmax_y/∂h, held fixed; R_kp = ∂h_kp/∂x; G = Σ J_kp R_kp over S and all positions p that the layer
    key's reduction covers; M = G ⊙ x. One forward pass and four backward passes serve the whole batch, however
    many channels and positions there are: J; G, a vector–Jacobian product; R x for all units at once, the
    Jacobian–vector product, as the derivative of G in the direction x with respect to its cotangent, in
    which it is linear; and the positive half, one more vector–Jacobian product. The rest is the negative half.

    Args:
        model: any module whose output is [batch, classes] logits; left exactly as found.
        layer: layer key of one layer.
        images: normalised inputs; moved to the model's device and type.
        channels: the mode's top channels.
        classes: the class to explain, one for all images or one for each.

    Raises:
        ModelError, AttributionError: the layer does not exist, or cannot be captured.
        VisualizationError: no image or channel, a channel or class that does not exist, an output of another
            form, or a layer that does not lie between the image and the output.
    """
    key = _one_layer(model, layer)
    if not len(images):
        raise VisualizationError(f"no images were given for a mode map of {layer}")
    parameter = next(model.parameters(), images)
    images = images.detach().to(parameter.device, parameter.dtype)
    traced = _traced(model, key, images)
    # Of the attention kernels only the plain one can be differentiated twice.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(False), torch.enable_grad(), plain, Capture(model, [key]) as capture:
        pixels = images.clone().requires_grad_()
        output, hidden = capture(pixels)
        arrange, units = make_reduction(model, key, traced).arrange, hidden[key.site]
        probability = _probability(output, classes, len(pixels))
        # Backward functions of a model's own may raise, above all where they are differentiated themselves.
        with model_call("gradients of a mode map were computed"):
            (slope,) = torch.autograd.grad(probability, units, retain_graph=True, allow_unused=True)
            if slope is None:
                raise VisualizationError(f"layer {layer} does not influence the output: choose another")
            selected = _checked_channels(layer, channels, arrange(slope).shape[1])
            return _halves(layer, arrange(units)[:, selected], arrange(slope)[:, selected].detach(), pixels)


def _traced(model: nn.Module, key: LayerKey, images: Maps) -> Traced | None:
    """What a forward pass tells of the layer, where its own type does not; one pass for all maps of a model."""
    if not needs_trace(model, key):
        return None
    known = _TRACED.setdefault(model, {})
    if key not in known:
        known[key] = trace_layers(model, [key], images).get(key.site)
    return known[key]


def _halves(layer: str, followed: Tensor, slope: Tensor, pixels: Tensor) -> ModeMaps:
    cotangent = slope.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(followed, pixels, cotangent, create_graph=True, allow_unused=True)
    if gradient is None:
        raise VisualizationError(f"layer {layer} does not depend on the image: choose another")
    point = pixels.detach()
    (movement,) = torch.autograd.grad(gradient, cotangent, point)
    rising = slope * (slope * movement > 0)
    (positive,) = torch.autograd.grad(followed, pixels, rising)
    net, positive = gradient.detach() * point, positive * point
    return ModeMaps(net, positive, net - positive)


def _probability(output: object, classes: int | Sequence[int] | Tensor, batch: int) -> Float[Tensor, ""]:
    """Sum over the batch of the probability of each image's class; in evaluation mode samples do not mix."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != batch:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise VisualizationError(f"the model's output for {batch} images is {found}: mode maps need [batch, classes]")
    wanted = torch.as_tensor(classes, device=output.device).long().reshape(-1)
    if len(wanted) not in (1, batch):
        raise VisualizationError(f"{len(wanted)} classes were given for {batch} images: give one, or one for each")
    if not 0 <= int(wanted.min()) <= int(wanted.max()) < output.shape[1]:
        raise VisualizationError(f"class {wanted.tolist()} was asked for: the model has {output.shape[1]}, from 0")
    return output.softmax(dim=1).gather(1, wanted.expand(batch)[:, None]).sum()


def _checked_channels(layer: str, channels: ChannelNumbers, count: int) -> list[int]:
    selected = sorted({int(channel) for channel in channels})
    if not selected or not 0 <= selected[0] <= selected[-1] < count:
        raise VisualizationError(f"channels {selected} of {layer} were asked for: it has {count}, numbered from 0")
    return selected


def _one_layer(model: nn.Module, layer: str) -> LayerKey:
    keys = resolve_layers(model, [layer])
    if len(keys) != 1:
        raise VisualizationError(f"{layer!r} names {len(keys)} layers, e.g. {keys[0]} and {keys[1]}: choose one")
    return keys[0]
