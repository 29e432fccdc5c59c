"""Reductions: from numbers shaped like a hidden tensor to one positive and one negative number per channel.

The order is fixed: first the split by sign at each position, then the sum over positions.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.capture import widened
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.tokens import find_tokens
from codec_dist.attribution.tracing import Traced
from codec_dist.models import LayerKey
from codec_dist.utils import suggestion

Positions = Float[Tensor, "batch channels positions"]
Split = tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]

CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
# Modules of torch that keep the order of what comes before.
ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
# What timm's MLPs do between their two linear layers.
WITHIN_MLP = ("act", "drop1", "norm")


class Reduction(NamedTuple):
    """How one layer's tensors are reduced."""

    arrange: Callable[[Tensor], Positions]
    """From the hidden shape to [batch, channels, positions], as a view where possible."""
    mean: bool = False
    """Mean instead of the sum over positions."""
    channel_axis: Callable[[Tensor], int] = lambda values: 1
    """Which dimension of a hidden tensor holds the channels."""

    def split(self, values: Float[Tensor, "batch ..."]) -> Split:
        """Positive and negative parts [batch, channels]: split by sign at each position, then summed."""
        arranged = widened(self.arrange(values))
        positive, negative = arranged.clamp(min=0).sum(dim=2), arranged.clamp(max=0).sum(dim=2)
        if self.mean:
            return positive / arranged.shape[2], negative / arranged.shape[2]
        return positive, negative

    def positions(self, values: Float[Tensor, "batch ..."]) -> tuple[int, ...]:
        """Shape of the positions of a hidden tensor: (height, width) of an image, else their number alone."""
        if values.ndim == 4:
            axis = self.channel_axis(values)
            return tuple(size for place, size in enumerate(values.shape) if place not in (0, axis))
        return (self.arrange(values).shape[2],)


def make_reduction(model: nn.Module, key: LayerKey, traced: Traced | None = None) -> Reduction:
    """The reduction that a layer key asks for.

    Without a name: over all dimensions but the batch and the channels. Those are where the module's type says so
    (convolutions, linear layers, norms), else where the forward pass proves it (:func:`trace_layers`), else the
    last of [batch, tokens, channels]. By name: ``tokens`` (all tokens), ``patch_tokens`` (those of the image,
    without class, distillation and register tokens), ``class_token`` (it alone), ``heads`` (attention heads
    instead of channels, over tokens and head dimensions), ``channels_first`` and ``channels_last`` (where the
    channels of an image are, should the default be wrong), ``mean`` (the default as a mean over positions).

    Args:
        model: the model.
        key: the layer.
        traced: what a forward pass showed of the layer; without it the channels of unknown modules come first, and
            class and patch tokens cannot be had.

    Raises:
        AttributionError: no such reduction, or the model does not have what it needs. What the tensor must have is
            checked when it is reduced.
    """
    name = key.reduction
    if name not in (None, "mean", "channels_first", "channels_last", *NAMED):
        known = suggestion(name, [*NAMED, "mean", "channels_first", "channels_last"])
        raise AttributionError(f"layer {key}: unknown reduction {name!r}: {known}")
    if name == "heads":
        return Reduction(_heads(model, key))
    axis = _channel_axis(model, key, traced)

    def arrange(values: Tensor) -> Positions:
        if name in ("class_token", "patch_tokens"):
            _require_three(key, values)
            tokens = 3 - axis(values)
            values = find_tokens(model, key, traced, values.shape[tokens]).of(values, tokens)
        elif name == "tokens":
            _require_three(key, values)
        dimension = axis(values)
        return values.unsqueeze(2) if values.ndim == 2 else values.movedim(dimension, 1).flatten(2)

    return Reduction(arrange, name == "mean", axis)


def needs_trace(model: nn.Module, key: LayerKey) -> bool:
    """Whether a layer's reduction depends on what the forward pass tells."""
    if key.reduction in ("class_token", "patch_tokens"):
        return True
    known = keeps_channels_last(model, key) or keeps_channels_first(model, key)
    return key.reduction in (None, "mean", "tokens") and not known


def _channel_axis(model: nn.Module, key: LayerKey, traced: Traced | None) -> Callable[[Tensor], int]:
    named = key.reduction if key.reduction in ("channels_first", "channels_last") else None
    last = named == "channels_last" or (named is None and keeps_channels_last(model, key))
    first = named == "channels_first" or (named is None and keeps_channels_first(model, key))

    def axis(values: Tensor) -> int:
        if values.ndim < 2:
            raise AttributionError(f"layer {key} is {list(values.shape)}: at least [batch, channels] is needed")
        if named == "channels_last" and values.ndim != 4:
            raise AttributionError(f"layer {key} is {list(values.shape)}: channels_last needs four dimensions")
        if first or values.ndim == 2:
            return 1
        if last:
            return values.ndim - 1
        if traced is not None and traced.channel_axis is not None:
            return traced.channel_axis
        if values.ndim == 3:
            return 2
        if traced is not None:
            raise AttributionError(
                f"layer {key} is {list(values.shape)}, and the forward pass does not tell which dimension holds its "
                f"channels: say so by {key.module}:channels_first or {key.module}:channels_last"
            )
        return 1

    return axis


def _heads(model: nn.Module, key: LayerKey) -> Callable[[Tensor], Positions]:
    parent = model.get_submodule(key.module.rpartition(".")[0])
    heads = getattr(parent, "num_heads", None)
    if not heads or not key.at_input:
        raise AttributionError(
            f"layer {key}: `heads` needs the input of an attention's output projection (NAME.proj@input:heads) "
            "whose attention has `num_heads`"
        )

    def arrange(values: Tensor) -> Positions:
        _require_three(key, values)
        batch, tokens, width = values.shape
        if width % heads:
            raise AttributionError(f"layer {key}: {width} dimensions do not divide into {heads} heads")
        return values.reshape(batch, tokens, heads, width // heads).transpose(1, 2).flatten(2)

    return arrange


NAMED = ("tokens", "patch_tokens", "class_token", "heads")


def _require_three(key: LayerKey, values: Tensor) -> None:
    if values.ndim != 3:
        raise AttributionError(f"layer {key} is {list(values.shape)}: {key.reduction} needs [batch, tokens, channels]")


# ---- Where the channels of a hidden tensor are, for modules of torch whose own type says so


def keeps_channels_last(model: nn.Module, key: LayerKey) -> bool:
    """Whether a four-dimensional output (or input) of the module is [batch, height, width, channels]."""
    return _order(model, key.module, key.at_input) == "last"


def keeps_channels_first(model: nn.Module, key: LayerKey) -> bool:
    """Whether a three-dimensional output (or input) of the module is [batch, channels, length], not tokens."""
    return _order(model, key.module, key.at_input) == "first"


def _order(model: nn.Module, name: str, at_input: bool) -> str | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    known = _known(module, at_input)
    if known is not None:
        return known
    if isinstance(module, nn.Sequential) and len(module):
        children = [child for child, _ in module.named_children()]
        return _order(model, f"{name}.{children[0 if at_input else -1]}".lstrip("."), at_input)
    before = _before(model, name) if type(module).__module__ in ELEMENTWISE or type(module) is nn.Identity else None
    return None if before is None else _order(model, before, at_input=False)


def _known(module: nn.Module, at_input: bool) -> str | None:
    if isinstance(module, CHANNELS_FIRST):
        return "first"
    # Subclasses of LayerNorm normalise channels that come first.
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        return "last"
    dimensions = getattr(module, "dims", None)
    if type(module).__name__ == "Permute" and isinstance(dimensions, list | tuple):
        to_last = list(dimensions) == [0, 2, 3, 1]
        return ("first" if at_input else "last") if to_last else ("last" if at_input else "first")
    return None


def _before(model: nn.Module, name: str) -> str | None:
    """The module whose output a module gets, where that is plain from the structure."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    siblings = [child for child, _ in parent.named_children()]
    if isinstance(parent, nn.Sequential):
        place = siblings.index(own)
        return f"{parent_name}.{siblings[place - 1]}".lstrip(".") if place else None
    if "fc1" in siblings and own in WITHIN_MLP:
        return f"{parent_name}.fc1".lstrip(".")
    return None
