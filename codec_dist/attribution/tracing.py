"""Following the axes of hidden tensors through a forward pass: where channels are, and which tokens are the image's.

Neither can be told from a shape, nor from a block's class. What settles them is what the network does: convolutions
and norms say which axis holds channels, additions and permutations carry that to the tensors before and behind them,
and class tokens and registers are what is joined to the tokens of the image from parameters.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from codec_dist.attribution import axes
from codec_dist.attribution.axes import IMAGE, UNKNOWN, Axis, Meaning, Origin, Run
from codec_dist.attribution.axis_rules import CHANNELS, FEATURES, POSITIONS, Call, meanings
from codec_dist.attribution.capture import borrowed, edited
from codec_dist.models import LayerKey

logger = logging.getLogger(__name__)


class Traced(NamedTuple):
    """What a forward pass tells of one hidden tensor.

    Attributes:
        channel_axis: the dimension of the channels; None where the pass does not prove it.
        tokens: for three dimensions, the runs along the one that is not the channels'; else empty.
        read_out: origins of single tokens that the network picks from all.
    """

    channel_axis: int | None
    tokens: tuple[Run, ...]
    read_out: frozenset[Origin]


def trace_layers(
    model: nn.Module, keys: Iterable[LayerKey], images: Tensor, *others: object, **named: object
) -> dict[LayerKey, Traced]:
    """What one forward pass without gradients tells of each site that it reaches.

    Args:
        model: any state; left as found.
        keys: layer keys; their reductions are ignored.
        images: inputs on the model's device, [batch, ...]; the first is used, twice.
        *others: what else the model takes.
        **named: the same by name.

    Raises:
        AttributionError: the model has no such module, or it does not return (or take) exactly one tensor.
    """
    hidden: dict[LayerKey, Tensor] = {}

    def keep(site: LayerKey, tensor: Tensor) -> Tensor:
        hidden.setdefault(site, tensor)
        return tensor

    with torch.inference_mode(False), torch.no_grad(), borrowed(model):
        pair = torch.cat([images[:1], images[:1]])
        with edited(model, {key.site: partial(keep, key.site) for key in keys}), AxisTrace(model, pair) as trace:
            model(pair, *others, **named)
        return {site: trace.of(tensor) for site, tensor in hidden.items()}


class AxisTrace(TorchDispatchMode):
    """While entered, follows every tensor that is computed without gradients from the parameters of a model and images.

    Args:
        model: names the parameters.
        images: what the forward pass will get; of four dimensions, the second are channels.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._known: Any = WeakTensorKeyDictionary()
        self._names = {id(each): name for name, each in [*model.named_parameters(), *model.named_buffers()]}
        # Tensors that were filled piece by piece, kept so that no other gets their memory.
        self._scattered: dict[int, Tensor] = {}
        self._read_out: set[Origin] = set()
        meaning = axes.fresh(images.shape, True, IMAGE)
        if images.ndim == 4:
            axes.mark(meaning.axes[1], CHANNELS)
            for axis in meaning.axes[2:]:
                axes.mark(axis, POSITIONS)
        self._known[images] = meaning

    def of(self, hidden: Tensor) -> Traced:
        """What is known of a tensor that was seen."""
        meaning = self.meaning(hidden)
        channel = _channel_axis(meaning)
        tokens = meaning.runs(2 if channel == 1 else 1) if hidden.ndim == 3 else ()
        return Traced(channel, tokens, frozenset(self._read_out))

    def meaning(self, tensor: Tensor) -> Meaning:
        """What is known of a tensor; parameters and constants are known by their names alone."""
        if tensor.untyped_storage().data_ptr() in self._scattered and tensor.numel():
            return axes.fresh(tensor.shape, True, UNKNOWN, lost=True)
        if tensor not in self._known:
            name = self._names.get(id(tensor))
            self._known[tensor] = axes.fresh(tensor.shape, False, frozenset([name] if name else []))
        found: Meaning = self._known[tensor]
        return found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = [each for each in _flat(result) if isinstance(each, Tensor)]
        try:
            inputs = [self.meaning(each) for each in _flat((args, kwargs or {})) if isinstance(each, Tensor)]
            found = meanings(Call(function, args, kwargs or {}, self, inputs, outputs))
        except Exception as error:  # noqa: BLE001  the model's own pass goes on, whatever it computes with
            logger.debug("the trace does not follow %s: %s", function, error)
            found = [axes.fresh(output.shape, True, UNKNOWN, lost=True) for output in outputs]
        for output, meaning in zip(outputs, found, strict=True):
            self._known[output] = meaning
        return result

    def scatter(self, target: Tensor) -> None:
        """Note that a part of this tensor's memory was overwritten."""
        self._scattered[target.untyped_storage().data_ptr()] = target

    def pick(self, origin: Origin) -> None:
        """Note that the network takes a single token from the others."""
        self._read_out.add(origin)


def _channel_axis(meaning: Meaning) -> int | None:
    """The one axis, other than the batch, that the evidence says holds channels."""
    evidence = {place: _evidence(axis) for place, axis in enumerate(meaning.axes) if place}
    if len(evidence) == 1:
        return 1
    for wanted in (CHANNELS, FEATURES):
        found = [place for place, marks in evidence.items() if wanted in marks]
        found = found if len(found) < 2 else [place for place in found if POSITIONS not in evidence[place]]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _evidence(axis: Axis) -> set[str]:
    """What is known of all factors of an axis alike."""
    marks = [atom.kind.evidence for atom in axis]
    return set.intersection(*marks) if marks else set()


def _flat(value: Any) -> Iterable[Any]:
    """Everything in nested tuples, lists and dictionaries."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, dict):
        yield from _flat(tuple(value.values()))
    else:
        yield value
