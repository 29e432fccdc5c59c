"""Contexts in which a model runs with some channels of a layer changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution import edited, make_reduction, needs_trace, trace_layers
from codec_dist.interventions.errors import InterventionError
from codec_dist.models import LayerKey, resolve_layers

ChannelNumbers = Sequence[int] | Int[np.ndarray, "chosen"] | Int[Tensor, "chosen"]


@contextmanager
def ablate(model: nn.Module, layer: str, channels: ChannelNumbers) -> Iterator[None]:
    """While open, the chosen channels of a layer are zero in every forward pass (docs/method.md §6).

    A channel is set at all positions that the layer key's reduction covers: height and width, tokens,
    the class token alone (``:class_token``), or all dimensions of a head (``:heads``). Only hooks are
    added, and removed on exit, also after an error; contexts may be nested, of one layer too.

    Args:
        model: any module.
        layer: layer key of one layer, e.g. ``layer4.2`` or ``blocks.3.mlp.fc2@input``.
        channels: channel numbers, from 0.

    Raises:
        ModelError: the model has no such layer.
        InterventionError: a number below 0, a key that names several layers, or, in the forward pass, a
            number beyond the layer's channels.
    """
    with scale(model, layer, channels, 0.0):
        yield


@contextmanager
def preserve(model: nn.Module, layer: str, channels: ChannelNumbers) -> Iterator[None]:
    """While open, all *other* channels of a layer are zero. Otherwise as :func:`ablate`."""
    selected = _numbers(layer, channels)
    with _edit(
        model, layer, selected, lambda count: _factors(count, selected, inside=1.0, outside=0.0), torch.mul, 1.0
    ):
        yield


@contextmanager
def scale(model: nn.Module, layer: str, channels: ChannelNumbers, factor: float) -> Iterator[None]:
    """While open, the chosen channels of a layer are multiplied by ``factor``. Otherwise as :func:`ablate`."""
    selected = _numbers(layer, channels)
    with _edit(
        model, layer, selected, lambda count: _factors(count, selected, inside=factor, outside=1.0), torch.mul, 1.0
    ):
        yield


@contextmanager
def add(model: nn.Module, layer: str, vector: Float[Tensor, "channels"]) -> Iterator[None]:
    """While open, ``vector`` is added to a layer's channels (steering). Otherwise as :func:`ablate`.

    Raises:
        InterventionError: in the forward pass, the vector has another length than the layer has channels.
    """

    def values(count: int) -> Tensor:
        if len(vector) != count:
            raise InterventionError(f"a vector of {len(vector)} numbers cannot be added to {layer}: {count} channels")
        return vector.detach()

    with _edit(model, layer, [], values, torch.add, 0.0):
        yield


class ChannelLayout:
    """Where the channels of one layer sit in its hidden tensor."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.key = resolve_layer(model, layer)
        self._model = model
        self._arrange = make_reduction(model, self.key).arrange
        self._known: dict[torch.Size, tuple[Tensor, int]] = {}
        self.learned, self.learning = not needs_trace(model, self.key), False

    def learn(self, images: Tensor, *others: object, **named: object) -> None:
        """Find out from a forward pass where channels and tokens are, if the layer's module does not tell.

        Args:
            images: inputs on the model's device; one is used.
            *others: what else the model takes.
            **named: the same by name.
        """
        if self.learned or self.learning:
            return
        self.learning = True
        try:
            traced = trace_layers(self._model, [self.key], images, *others, **named).get(self.key.site)
            self._arrange = make_reduction(self._model, self.key, traced).arrange
            self.learned = True
        finally:
            self.learning = False

    def count(self, hidden: Float[Tensor, "batch ..."]) -> int:
        """Number of channels."""
        return self._layout(hidden)[1]

    def spread(
        self, values: Float[Tensor, "rows channels"], hidden: Float[Tensor, "batch ..."], elsewhere: float
    ) -> Float[Tensor, "rows ..."]:
        """Numbers per channel in a shape that broadcasts against ``hidden``.

        Positions that the reduction does not cover get the number ``elsewhere``.
        """
        index = self._layout(hidden)[0]
        padded = torch.cat([values, values.new_full((len(values), 1), elsewhere)], dim=1)
        return padded.index_select(1, index.flatten()).reshape(len(values), *index.shape)

    def _layout(self, hidden: Tensor) -> tuple[Int[Tensor, "..."], int]:
        """The channel of every element of one sample, with dimensions of equal entries cut to one."""
        shape = hidden.shape[1:]
        if shape not in self._known:
            # A tensor made in inference mode could not serve a later pass with gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._known[shape] = self._find_layout(shape, hidden.device)
        return self._known[shape]

    def _find_layout(self, shape: torch.Size, device: torch.device) -> tuple[Tensor, int]:
        elements = torch.arange(shape.numel(), dtype=torch.float64).reshape(1, *shape)
        arranged = self._arrange(elements)[0].long()
        channels = len(arranged)
        index = torch.full((shape.numel(),), channels)
        index[arranged] = torch.arange(channels)[:, None].expand_as(arranged)
        index = index.reshape(shape)
        for dimension in range(index.ndim):
            first = index.narrow(dimension, 0, 1)
            if (index == first).all():
                index = first
        return index.to(device), channels


def resolve_layer(model: nn.Module, layer: str) -> LayerKey:
    """The one layer that a key names.

    Raises:
        ModelError: the model has no such layer.
        InterventionError: the key names several.
    """
    keys = resolve_layers(model, [layer])
    if len(keys) != 1:
        raise InterventionError(f"{layer!r} names {len(keys)} layers, e.g. {keys[0]} and {keys[1]}: choose one")
    return keys[0]


@contextmanager
def _edit(
    model: nn.Module,
    layer: str,
    selected: list[int],
    values: Callable[[int], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
    elsewhere: float,
) -> Iterator[None]:
    layout = ChannelLayout(model, layer)

    def learn(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if inputs:
            layout.learn(*inputs, **named)

    def edit(hidden: Tensor) -> Tensor:
        if layout.learning:
            return hidden
        count = layout.count(hidden)
        if selected and max(selected) >= count:
            raise InterventionError(f"channel {max(selected)} of {layer} does not exist: it has {count} channels (0 …)")
        per_channel = values(count).to(hidden.device, hidden.dtype)[None]
        return combine(hidden, layout.spread(per_channel, hidden, elsewhere))

    handle = model.register_forward_pre_hook(learn, with_kwargs=True)
    try:
        with edited(model, {layout.key: edit}):
            yield
    finally:
        handle.remove()


def _factors(count: int, selected: list[int], *, inside: float, outside: float) -> Float[Tensor, "channels"]:
    factors = torch.full((count,), outside, dtype=torch.float64)
    factors[selected] = inside
    return factors


def _numbers(layer: str, channels: ChannelNumbers) -> list[int]:
    numbers = [int(channel) for channel in channels]
    if numbers and min(numbers) < 0:
        raise InterventionError(f"channel {min(numbers)} of {layer} does not exist: channels are numbered from 0")
    return numbers
