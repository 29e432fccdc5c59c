"""What each operation does to the axes of the tensors that it gets: one small rule for each kind of operation.

A rule that does not know a form of its operation may raise, or return other shapes than the outputs have: then the
outputs count as not followed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from codec_dist.attribution import axes
from codec_dist.attribution.axes import IMAGE, UNKNOWN, Axis, Meaning, Origin, Run

# Evidence for a channel axis: of convolutions and norms; of matrix products and factors, which also act on tokens.
CHANNELS, FEATURES = "channels", "features"
POSITIONS = "positions"


class TokenNotes(Protocol):
    """What rules note beside the axes of outputs."""

    def scatter(self, target: Tensor) -> None:
        """Note that a part of this tensor's memory was overwritten."""

    def pick(self, origin: Origin) -> None:
        """Note that the network takes a single token from the others."""


class Call(NamedTuple):
    """One operation: what was called, the meanings of all tensors that it got, and what it returned."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: TokenNotes
    inputs: list[Meaning]
    outputs: list[Tensor]

    @property
    def name(self) -> str:
        return str(self.function.overloadpacket).removeprefix("aten.")

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def dimension(self, place: int, default: int = 0, extra: int = 0) -> int:
        """A dimension among the arguments, counted from the front."""
        return int(self.argument(place, "dim", default)) % max(len(self.inputs[0].axes) + extra, 1)


Rule = Callable[[Call], Sequence[Meaning]]


def meanings(call: Call) -> Sequence[Meaning]:
    """What is known of the outputs of an operation, in their order."""
    if not call.inputs:
        return [axes.fresh(output.shape, False, frozenset()) for output in call.outputs]
    rule = RULES.get(call.name) or RULES.get(call.name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in call.function.tags:
        rule = _elementwise
    if rule is None and _keeps_axes(call):
        rule = _same
    if rule is not None:
        try:
            found = rule(call)
        except (IndexError, TypeError, ValueError):  # a form of the operation that the rule does not know
            found = []
        if [each.shape for each in found] == [tuple(output.shape) for output in call.outputs]:
            return found
    elif call.function._schema.is_mutable and any(value.varied for value in call.inputs):
        call.trace.scatter(call.args[0])
    return [_unfollowed(call, output) for output in call.outputs]


def _keeps_axes(call: Call) -> bool:
    """Whether an operation of one tensor leaves its shape and names no dimension: activations that torch does not mark
    as acting on each number by itself, such as hardswish.
    """
    names = {argument.name for argument in call.function._schema.arguments}
    return (
        len(call.inputs) == 1
        and not names & {"dim", "dims", "dimension", "shape", "size", "shifts"}
        and all(tuple(output.shape) == call.inputs[0].shape for output in call.outputs)
    )


def _unfollowed(call: Call, output: Tensor) -> Meaning:
    """The result of an operation that the trace does not follow."""
    varied = any(value.varied for value in call.inputs)
    plain = all(not value.divided and value.origin == IMAGE for value in call.inputs if value.varied)
    origin: Origin = (IMAGE if plain else UNKNOWN) if varied else frozenset()
    return axes.fresh(output.shape, varied, origin, lost=varied and not plain)


# ---- what each operation does to axes


def _elementwise(call: Call) -> Sequence[Meaning]:
    whole = max((math.prod(value.shape) for value in call.inputs), default=0)
    for value in call.inputs:
        # A learned factor or offset for each entry of one axis, such as a norm's or LayerScale's.
        long = [place - len(value.axes) for place, axis in enumerate(value.axes) if axis]
        if not value.varied and len(long) == 1 and math.prod(value.shape) < whole:
            for other in call.inputs:
                if len(other.axes) >= -long[0] and other.shape[long[0]] == value.shape[long[0]]:
                    axes.mark(other.axes[long[0]], FEATURES)
    return [axes.combined(call.inputs)] * len(call.outputs)


def _same(call: Call) -> Sequence[Meaning]:
    return call.inputs[:1] * len(call.outputs)


def _view(call: Call) -> Sequence[Meaning]:
    return [axes.viewed(call.inputs[0], call.outputs[0].shape)]


def _expand(call: Call) -> Sequence[Meaning]:
    value, shape = call.inputs[0], call.outputs[0].shape
    front = ((),) * (len(shape) - len(value.axes))
    grown = zip((*front, *value.axes), shape, strict=True)
    return [value.with_axes(axis or axes.new_axis(size) for axis, size in grown)]


def _permute(call: Call) -> Sequence[Meaning]:
    value = call.inputs[0]
    if call.name == "permute":
        order = [dimension % len(value.axes) for dimension in call.args[1]]
    else:
        order = list(range(len(value.axes)))
        first, second = (0, -1) if call.name == "t" else (call.args[1], call.args[2])
        if order:
            order[first], order[second] = order[second], order[first]
    return [value.with_axes(value.axes[place] for place in order)]


def _slice(call: Call) -> Sequence[Meaning]:
    dimension, (output,) = call.dimension(1), call.outputs
    size = call.inputs[0].shape[dimension]
    start, step = call.argument(2, "start") or 0, call.argument(4, "step") or 1
    start = min(max(start + size if start < 0 else start, 0), size)
    return [_taken(call, dimension, start, output.shape[dimension], step)]


def _select(call: Call) -> Sequence[Meaning]:
    dimension = call.dimension(1)
    value = _taken(call, dimension, call.argument(2, "index") % call.inputs[0].shape[dimension], 1)
    return [_dropped(value, dimension)]


def _unbind(call: Call) -> Sequence[Meaning]:
    dimension = call.dimension(1)
    return [_dropped(_taken(call, dimension, place, 1), dimension) for place in range(len(call.outputs))]


def _split(call: Call) -> Sequence[Meaning]:
    dimension, start, found = call.dimension(2), 0, []
    for output in call.outputs:
        found.append(_taken(call, dimension, start, output.shape[dimension]))
        start += output.shape[dimension]
    return found


def _taken(call: Call, dimension: int, start: int, length: int, step: int = 1) -> Meaning:
    value = call.inputs[0]
    if length == 0:
        return axes.fresh([0 if place == dimension else size for place, size in enumerate(value.shape)], False, IMAGE)
    found = axes.selected(value, dimension, start, length, step=step)
    if length == 1 and len(value.runs(dimension)) > 1:
        call.trace.pick(found.origin)
    return found


def _dropped(value: Meaning, dimension: int) -> Meaning:
    return value.with_axes(axis for place, axis in enumerate(value.axes) if place != dimension)


def _concatenate(call: Call) -> Sequence[Meaning]:
    values = [value for value in call.inputs if 0 not in value.shape]
    if not values:
        return [axes.fresh(call.outputs[0].shape, False, frozenset())]
    return [axes.joined(values, call.dimension(1))]


def _stack(call: Call) -> Sequence[Meaning]:
    value = axes.combined(call.inputs, keep_all=True)
    place = call.dimension(1, extra=1)
    return [value.with_axes((*value.axes[:place], axes.new_axis(len(call.inputs)), *value.axes[place:]))]


def _pad(call: Call) -> Sequence[Meaning]:
    value, amounts = call.inputs[0], list(call.args[1])
    for back, sides in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        dimension = len(value.axes) - back
        before, after = (max(side, 0) for side in sides)
        if before or after:
            value = axes.padded(value, dimension, before, after)
        if min(sides) < 0:
            size = value.shape[dimension] + sum(min(side, 0) for side in sides)
            value = axes.selected(value, dimension, max(-sides[0], 0), size)
    return [value]


def _reduce(call: Call) -> Sequence[Meaning]:
    value, output = call.inputs[0], call.outputs[0]
    wanted = call.argument(2 if call.name == "linalg_vector_norm" else 1, "dim")
    wanted = range(len(value.axes)) if wanted is None or wanted == [] else wanted
    dropped = {each % max(len(value.axes), 1) for each in ([wanted] if isinstance(wanted, int) else wanted)}
    origins = {run.origin for place in dropped for run in value.runs(place)}
    origin = value.origin if len(origins) == 1 and not value.divided else IMAGE if IMAGE in origins else value.origin
    kept = output.ndim == len(value.axes)
    reduced = [
        () if place in dropped else axis for place, axis in enumerate(value.axes) if kept or place not in dropped
    ]
    return [Meaning(tuple(reduced), value.varied, origin)] * len(call.outputs)


def _matrix_product(call: Call) -> Sequence[Meaning]:
    """Of rows with columns: a linear layer where one side is a parameter, else attention's product of two tensors."""
    rows, columns = call.inputs[-2:]
    *batch, row, inner = rows.axes
    inner_of_columns, column = columns.axes[-2:]
    if rows.varied and columns.varied:
        return [Meaning((*batch, row, column), True, rows.origin)]
    if columns.varied:
        axes.mark(inner_of_columns, FEATURES)
        produced = axes.new_axis(rows.shape[-2], None, FEATURES)
        return [Meaning((*columns.axes[:-2], produced, column), True, columns.origin)]
    axes.mark(inner, FEATURES)
    produced = axes.new_axis(columns.shape[-1], _lost(inner), FEATURES)
    return [Meaning((*batch, row, produced), rows.varied, rows.origin)]


def _lost(axis: Axis) -> Run | None:
    """Unknown tokens, where the tokens along an axis were known before they were mixed."""
    return Run(1, UNKNOWN) if any(atom.runs is not None for atom in axis) else None


def _attention(call: Call) -> Sequence[Meaning]:
    query, _, value = call.inputs[:3]
    result = query.with_axes((*query.axes[:-1], value.axes[-1]))
    rest = [_unfollowed(call, output) for output in call.outputs[1:]]
    return [Meaning(result.axes, True, query.origin), *rest]


def _linear(call: Call) -> Sequence[Meaning]:
    value, weight = call.inputs[:2]
    axes.mark(value.axes[-1], FEATURES)
    produced = axes.new_axis(weight.shape[0], _lost(value.axes[-1]), FEATURES)
    return [Meaning((*value.axes[:-1], produced), value.varied, value.origin)]


def _convolution(call: Call) -> Sequence[Meaning]:
    value, output = call.inputs[0], call.outputs[0]
    channel = len(value.axes) - (len(call.inputs[1].axes) - 1)
    axes.mark(value.axes[channel], CHANNELS)
    for axis in value.axes[channel + 1 :]:
        axes.mark(axis, POSITIONS)
    produced = axes.new_axis(output.shape[channel], _lost(value.axes[channel]), CHANNELS)
    positions = _positions(value, output, channel + 1)
    return [Meaning((*value.axes[:channel], produced, *positions), value.varied, value.origin)]


def _positions(value: Meaning, output: Tensor, first: int) -> list[Axis]:
    """Height and width after something that looks at neighbours, and may change their number."""
    return [
        axes.new_axis(output.shape[place], _lost(value.axes[place]), POSITIONS)
        for place in range(first, len(value.axes))
    ]


def _pool(dimensions: int) -> Rule:
    def rule(call: Call) -> Sequence[Meaning]:
        value = call.inputs[0]
        first = len(value.axes) - dimensions
        for axis in value.axes[first:]:
            axes.mark(axis, POSITIONS)
        return [
            Meaning((*value.axes[:first], *_positions(value, output, first)), value.varied, value.origin)
            for output in call.outputs
        ]

    return rule


def _gated(call: Call) -> Sequence[Meaning]:
    """Half of an axis as a factor for the other half."""
    value, output, dimension = call.inputs[0], call.outputs[0], call.dimension(1, default=-1)
    found = list(value.axes)
    found[dimension] = axes.new_axis(output.shape[dimension], _lost(value.axes[dimension]))
    if found[dimension] and value.axes[dimension]:
        found[dimension][0].kind.join(value.axes[dimension][0].kind)
    return [value.with_axes(found)]


def _shuffled(call: Call) -> Sequence[Meaning]:
    """Channels to positions, or back: what is computed so has channels where its operand has them."""
    value, output = call.inputs[0], call.outputs[0]
    channel = len(value.axes) - 3
    axes.mark(value.axes[channel], CHANNELS)
    produced = axes.new_axis(output.shape[channel], _lost(value.axes[channel]), CHANNELS)
    positions = _positions(value, output, channel + 1)
    return [Meaning((*value.axes[:channel], produced, *positions), value.varied, value.origin)]


def _channel_norm(call: Call) -> Sequence[Meaning]:
    value = call.inputs[0]
    axes.mark(value.axes[1], CHANNELS)
    return [value, *(_unfollowed(call, output) for output in call.outputs[1:])]


def _last_norm(call: Call) -> Sequence[Meaning]:
    value = call.inputs[0]
    if len(call.args[1]) == 1:
        axes.mark(value.axes[-1], CHANNELS)
    return [value, *(_unfollowed(call, output) for output in call.outputs[1:])]


def _encoder_layer(call: Call) -> Sequence[Meaning]:
    axes.mark(call.inputs[0].axes[-1], CHANNELS)
    return [call.inputs[0], *(_unfollowed(call, output) for output in call.outputs[1:])]


def _reordered(call: Call) -> Sequence[Meaning]:
    value = call.inputs[0]
    return [value.with_axes(tuple(atom.forgotten() for atom in axis) for axis in value.axes)] * len(call.outputs)


def _taken_by_index(call: Call) -> Sequence[Meaning]:
    value, output, dimension = call.inputs[0], call.outputs[0], call.dimension(1)
    axis = value.axes[dimension]
    lost = Run(output.shape[dimension], UNKNOWN) if _lost(axis) else None
    found = list(value.axes)
    found[dimension] = axes.new_axis(output.shape[dimension], lost)
    if found[dimension] and len(axis) == 1:
        found[dimension][0].kind.join(axis[0].kind)
    return [value.with_axes(found)]


def _assigned(call: Call) -> Sequence[Meaning]:
    """``target.copy_(source)``, which is also what assignment to a part of a tensor is."""
    target, (before, *_, source) = call.args[0], call.inputs
    if target.numel() * target.element_size() == target.untyped_storage().nbytes():
        front = ((),) * (target.ndim - len(source.axes))
        grown = zip((*front, *source.axes), target.shape, strict=True)
        return [source.with_axes(axis or axes.new_axis(size) for axis, size in grown)]
    if not before.varied and not source.varied:
        return [before]
    call.trace.scatter(target)
    return [axes.fresh(target.shape, True, UNKNOWN, lost=True)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "squeeze_"), _view),
    **dict.fromkeys(("alias", "detach", "clone", "contiguous", "_to_copy", "lift_fresh", "dropout", "to"), _same),
    **dict.fromkeys(
        ("_softmax", "_safe_softmax", "softmax", "_log_softmax", "cumsum", "constant", "logcumsumexp"), _same
    ),
    **dict.fromkeys(("permute", "transpose", "t", "swapaxes", "numpy_T"), _permute),
    **dict.fromkeys(("cat", "concat"), _concatenate),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm"), _reduce),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "matmul"), _matrix_product),
    **dict.fromkeys(("convolution", "_convolution", "conv1d", "conv2d", "cudnn_convolution"), _convolution),
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm"), _channel_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "native_group_norm", "group_norm"), _channel_norm),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), _last_norm),
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _encoder_layer),
    **dict.fromkeys(("avg_pool1d", "max_pool1d", "_adaptive_avg_pool1d"), _pool(1)),
    **dict.fromkeys(("avg_pool2d", "max_pool2d", "max_pool2d_with_indices", "mkldnn_max_pool2d"), _pool(2)),
    **dict.fromkeys(("_adaptive_avg_pool2d", "adaptive_max_pool2d", "reflection_pad2d", "replication_pad2d"), _pool(2)),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), _pool(2)),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d"), _pool(2)),
    **dict.fromkeys(("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention"), _attention),
    **dict.fromkeys(("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"), _attention),
    **dict.fromkeys(("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math"), _attention),
    **dict.fromkeys(("roll", "flip", "sort"), _reordered),
    **dict.fromkeys(("_prelu_kernel", "rrelu_with_noise"), _same),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffled),
    "fractional_max_pool2d": _pool(2),
    "glu": _gated,
    "expand": _expand,
    "linear": _linear,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "stack": _stack,
    "constant_pad_nd": _pad,
    "index_select": _taken_by_index,
    "copy_": _assigned,
}
