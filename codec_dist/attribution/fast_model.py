"""A faster form of a model, for as long as it is being explained: folded BatchNorm, channels_last, narrow weights.

The faster form is made again for each use, from the weights as they are then, which costs less than a
hundredth of one path point; nothing can go stale. The original tensors are put back afterwards.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.capture import Capture

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FOLDED_INTO = (*CONVOLUTIONS, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FoldPair(NamedTuple):
    """A BatchNorm and the layer before it, by module name."""

    linear: str
    norm: str


def find_foldable(capture: Capture, image: Float[Tensor, "one ..."]) -> tuple[FoldPair, ...]:
    """The pairs that can be folded without anyone noticing.

    These are a convolution or linear layer and the BatchNorm to which its output goes, and nowhere else, each
    called once, neither hooked nor with a forward of its own, and no captured layer between the two. Who else
    uses an output is read off the autograd graph of one forward pass. That the folded model then gives the same
    numbers is for the self-check to find out.

    Args:
        capture: open, with the layers that are watched.
        image: one image, on the model's device.
    """
    calls = _record(capture, image)
    return tuple(
        FoldPair(linear, norm)
        for norm, (inputs, _) in calls.items()
        if isinstance(capture.model.get_submodule(norm), NORMS)
        for linear, (_, output) in calls.items()
        if output is inputs and _fits(capture.model.get_submodule(linear), output)
    )


@contextmanager
def prepared(
    model: nn.Module, pairs: Sequence[FoldPair] = (), channels_last: bool = False, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """While open, ``model`` is in its faster form; on exit it has its own tensors and methods back.

    Args:
        model: a borrowed model (parameters frozen, evaluation mode).
        pairs: what to fold; the BatchNorms then pass on what they get.
        channels_last: keep the weights of 2-d convolutions in that memory format.
        dtype: type of the weights of convolutions and linear layers, under autocast.
    """
    with ExitStack() as stack:
        for pair in pairs:
            linear, norm = model.get_submodule(pair.linear), model.get_submodule(pair.norm)
            weight, bias = _folded(linear, norm)
            _replace(stack, linear, "weight", weight)
            _replace(stack, linear, "bias", bias)
            norm.__dict__["forward"] = _pass_on
            stack.callback(norm.__dict__.pop, "forward")
        for module in model.modules():
            if type(module) in FOLDED_INTO:
                _convert(stack, module, channels_last and type(module) is nn.Conv2d, dtype)
        yield


def laid_out(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor with the strides that ``module.to(memory_format=...)`` gives it; itself if it has them.

    ``contiguous(memory_format=...)`` leaves strides of dimensions of size 1 as they are (a kernel of 1×1, a batch of
    one image, images of one channel), and with them torch's backward passes can be wrong.
    """
    wanted = torch.empty(tensor.shape, device="meta").to(memory_format=memory_format).stride()
    if tensor.stride() == wanted:
        return tensor
    return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


def unwatched(capture: Capture, pairs: Sequence[FoldPair]) -> tuple[FoldPair, ...]:
    """The pairs whose layers nobody but the capture watches or changes now."""
    own_hooks = Counter(site.module for site in capture.sites)

    def is_plain(name: str) -> bool:
        module = capture.model.get_submodule(name)
        return "forward" not in vars(module) and _hooks(module) <= own_hooks[name]

    return tuple(pair for pair in pairs if all(map(is_plain, pair)))


def _record(capture: Capture, image: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of linear layers whose output is used once, and of BatchNorms; each called once."""
    own_hooks = Counter(site.module for site in capture.sites)
    watched = {site.module for site in capture.sites if not site.at_input}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        # A layer that is called by keyword shows no input here: whoever looks for it finds none.
        calls.setdefault(name, []).append((inputs[0] if inputs else output, output))

    linear = set()
    with ExitStack() as stack:
        for name, module in capture.model.named_modules():
            if "forward" in vars(module) or _hooks(module) > own_hooks[name]:
                continue
            if type(module) in FOLDED_INTO and name not in watched:
                linear.add(name)
            elif not _is_plain_norm(module):
                continue
            stack.callback(module.register_forward_hook(partial(keep, name)).remove)
        output, _ = capture(image.detach().requires_grad_())
    uses = _count_uses(output.grad_fn)
    single = {name: made[0] for name, made in calls.items() if len(made) == 1}
    return {name: call for name, call in single.items() if name not in linear or uses.get(call[1].grad_fn) == 1}


def _fits(linear: nn.Module, output: Tensor) -> bool:
    """Whether the channels of a linear layer's output are the dimension that a BatchNorm normalises."""
    return isinstance(linear, CONVOLUTIONS) or (isinstance(linear, nn.Linear) and output.ndim == 2)


def _count_uses(end: object) -> dict[object, int]:
    """How many operations take the result of each node of the autograd graph."""
    uses: dict[object, int] = {}
    remaining, seen = [end], {end}
    while remaining:
        for parent, _ in getattr(remaining.pop(), "next_functions", ()):
            uses[parent] = uses.get(parent, 0) + 1
            if parent is not None and parent not in seen:
                seen.add(parent)
                remaining.append(parent)
    return uses


def _folded(linear: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias that do both: y = γ (Wx + b - μ) / √(σ² + ε) + β; factors are computed in float64."""
    mean = norm.running_mean.double()
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = 0 if norm.bias is None else norm.bias.double()
    start = 0 if linear.bias is None else linear.bias.double()
    kind = linear.weight.dtype
    weight = linear.weight * scale.to(kind).reshape(-1, *[1] * (linear.weight.ndim - 1))
    return weight, ((start - mean) * scale + shift).to(kind)


def _convert(stack: ExitStack, module: nn.Module, channels_last: bool, dtype: torch.dtype | None) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        made: Tensor = parameter
        if dtype is not None and made.dtype == torch.float32:
            made = made.to(dtype)
        if channels_last and made.ndim == 4:
            made = laid_out(made.detach(), torch.channels_last)
        if made is not parameter:
            _replace(stack, module, name, made)


def _replace(stack: ExitStack, module: nn.Module, name: str, value: Tensor) -> None:
    stack.callback(module._parameters.__setitem__, name, module._parameters[name])
    module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)


def _pass_on(values: Tensor) -> Tensor:
    return values


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) in NORMS and module.running_mean is not None


def _hooks(module: nn.Module) -> int:
    return sum(len(getattr(module, kind)) for kind in HOOKS)
