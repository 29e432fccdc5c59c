"""Reductions: from numbers shaped like a hidden tensor to one positive and one negative number per channel.

The order is fixed: first the split by sign at each position, then the sum over positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.channel_order import keeps_channels_first, keeps_channels_last, may_be_channels_last
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.outputs import widened
from codec_dist.models.layers import LayerKey
from codec_dist.utils import suggestion

Positions = Float[Tensor, "batch channels positions"]
Split = tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]


class Reduction(NamedTuple):
    """How one layer's tensors are reduced."""

    arrange: Callable[[Tensor], Positions]
    """From the hidden shape to [batch, channels, positions], as a view where possible."""
    mean: bool = False
    """Mean in place of the sum over positions."""
    channels_last: bool = False
    """The hidden tensor is [batch, height, width, channels]."""

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
            return tuple(values.shape[1:3] if self.channels_last else values.shape[2:])
        return (self.arrange(values).shape[2],)


def make_reduction(model: nn.Module, key: LayerKey) -> Reduction:
    """The reduction that a layer key asks for.

    Without a name: [batch, channels] as it is, [batch, tokens, channels] over tokens, and
    [batch, channels, height, width] over height and width; for modules that are known to keep channels last
    (linear layers, LayerNorm, Swin blocks) [batch, height, width, channels]. By name: ``tokens`` (all
    tokens), ``patch_tokens`` (without class and register tokens), ``class_token`` (the first alone), ``heads``
    (attention heads in place of channels, over tokens and head dimensions), ``channels_first`` and
    ``channels_last`` (where the channels of an image are, should the default be wrong), ``mean`` (the default
    as a mean over positions).

    Raises:
        AttributionError: no such reduction, or the model does not have what it needs.
    """
    name = key.reduction
    if name in (None, "mean", "channels_first", "channels_last"):
        last = name == "channels_last" or (name != "channels_first" and keeps_channels_last(model, key))
        first = name == "channels_first" or keeps_channels_first(model, key)
        checked = name in ("channels_first", "channels_last") or last or first

        def arrange(values: Tensor) -> Positions:
            if not checked and values.ndim == 4 and may_be_channels_last(model, key, values.shape):
                raise AttributionError(
                    f"layer {key} is {list(values.shape)}, and whether its channels are the second or the last "
                    f"dimension is not known: say so by {key.module}:channels_first or {key.module}:channels_last"
                )
            return _by_shape(key, values, first, last)

        return Reduction(arrange, name == "mean", last)
    if name not in NAMED:
        raise AttributionError(
            f"layer {key}: unknown reduction {name!r}: "
            f"{suggestion(name, [*NAMED, 'mean', 'channels_first', 'channels_last'])}"
        )
    return Reduction(NAMED[name](model, key))


def _by_shape(key: LayerKey, values: Tensor, first: bool, last: bool) -> Positions:
    if values.ndim < 2:
        raise AttributionError(f"layer {key} is {list(values.shape)}: at least [batch, channels] is needed")
    if key.reduction == "channels_last" and values.ndim != 4:
        raise AttributionError(f"layer {key} is {list(values.shape)}: channels_last needs four dimensions")
    if values.ndim == 2:
        return values.unsqueeze(2)
    if values.ndim == 3 and not first:
        return values.transpose(1, 2)
    return values.flatten(1, 2).transpose(1, 2) if last and values.ndim == 4 else values.flatten(2)


def _tokens(model: nn.Module, key: LayerKey) -> Callable[[Tensor], Positions]:
    return lambda values: _three(key, values).transpose(1, 2)


def _patch_tokens(model: nn.Module, key: LayerKey) -> Callable[[Tensor], Positions]:
    prefix = int(_first_attribute(model, "num_prefix_tokens", 1))
    return lambda values: _three(key, values)[:, prefix:].transpose(1, 2)


def _class_token(model: nn.Module, key: LayerKey) -> Callable[[Tensor], Positions]:
    if not _first_attribute(model, "has_class_token", True):
        raise AttributionError(f"layer {key}: {type(model).__name__} has no class token; use tokens or mean")
    return lambda values: _three(key, values)[:, :1].transpose(1, 2)


def _heads(model: nn.Module, key: LayerKey) -> Callable[[Tensor], Positions]:
    parent = model.get_submodule(key.module.rpartition(".")[0])
    heads = getattr(parent, "num_heads", None)
    if not heads or not key.at_input:
        raise AttributionError(
            f"layer {key}: `heads` needs the input of an attention's output projection (NAME.proj@input:heads) "
            "whose attention has `num_heads`"
        )

    def arrange(values: Tensor) -> Positions:
        batch, tokens, width = _three(key, values).shape
        if width % heads:
            raise AttributionError(f"layer {key}: {width} dimensions do not divide into {heads} heads")
        return values.reshape(batch, tokens, heads, width // heads).transpose(1, 2).flatten(2)

    return arrange


NAMED: dict[str, Callable[[nn.Module, LayerKey], Callable[[Tensor], Positions]]] = {
    "tokens": _tokens,
    "patch_tokens": _patch_tokens,
    "class_token": _class_token,
    "heads": _heads,
}


def _three(key: LayerKey, values: Tensor) -> Tensor:
    if values.ndim != 3:
        raise AttributionError(f"layer {key} is {list(values.shape)}: {key.reduction} needs [batch, tokens, channels]")
    return values


def _first_attribute(model: nn.Module, name: str, default: Any) -> Any:
    """An attribute of the model, or of the transformer that it wraps."""
    return next((getattr(module, name) for module in model.modules() if hasattr(module, name)), default)
