"""Which modules are MLPs whose neurons are units of analysis, as against squeeze-excite modules and other small nets.

Both have two linear layers (or convolutions of 1×1). What differs is what they do: an MLP computes its neurons at every
position, squeeze-excite at none, from the mean over positions, and gates all positions with what comes of it. So
the module, and the one around it, are run on shapes alone (torch's ``meta`` device), and the positions of the
neurons are counted.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# How the two layers are called in timm, torch, torchvision and what is modelled on them.
NAMES = (
    *(("fc1", "fc2"), ("fc1_x", "fc2"), ("linear1", "linear2"), ("lin1", "lin2")),
    *(("w12", "w3"), ("w1", "w2"), ("up_proj", "down_proj")),
)
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Inputs of fewer numbers are coordinates: the MLP computes relative position biases.
COORDINATES = 4
# Height and width of the images of shapes: few windows and strides do not divide them.
HEIGHT, WIDTH = 8, 8


def find_mlps(model: nn.Module) -> Iterator[str]:
    """Names of the second layers of all MLPs, in the order of the model's modules.

    An MLP is a module whose two layers are called as in ``NAMES``, or a ``Sequential`` of which exactly two items are
    linear layers, from some width back to it; in both cases not one that gates.
    """
    for name, module in model.named_modules():
        names = _two_layers(module)
        if names is None:
            continue
        first, second = (_linear(module.get_submodule(each)) for each in names)
        if _inputs(first) >= COORDINATES and not _gates(model, name, first, second):
            yield f"{name}.{names[1]}".lstrip(".")


def _two_layers(module: nn.Module) -> tuple[str, str] | None:
    children = dict(module.named_children())
    for names in NAMES:
        if all(name in children and _linear(children[name]) is not None for name in names):
            return names
    if isinstance(module, nn.Sequential):
        linear = [name for name, item in children.items() if isinstance(item, nn.Linear)]
        gates = any(isinstance(item, nn.Sigmoid | nn.Hardsigmoid) for item in children.values())
        if len(linear) == 2 and not gates and _inputs(children[linear[0]]) == children[linear[1]].out_features:
            return linear[0], linear[1]
    return None


def _linear(module: nn.Module) -> Any:
    """The module if it is a linear layer or a convolution, else the first inside (of an adapter, say), or None."""
    return next((each for each in module.modules() if isinstance(each, LINEAR)), None)


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _gates(model: nn.Module, name: str, first: nn.Module, second: nn.Module) -> bool:
    """Whether the module, or the one around it, returns all positions, or factors, but has neurons at no position."""
    own = model.get_submodule(name)
    if any(_is_gate(own, second, shape) for shape in _shapes(own, first)):
        return True
    around = model.get_submodule(name.rpartition(".")[0])
    # Not with tokens: MLPs of class attention see one token of all that pass, too.
    return bool(name) and any(_is_gate(around, second, shape) for shape in _shapes(around, first) if len(shape) == 4)


def _shapes(module: nn.Module, first: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs that the module may take."""
    widths = [_inputs(first), *(_inputs(each) for each in module.modules() if isinstance(each, LINEAR))]
    for width in dict.fromkeys(widths[:2]):
        yield 2, width, HEIGHT, WIDTH
        yield 2, HEIGHT, WIDTH, width
        yield 2, HEIGHT * WIDTH, width


def _is_gate(module: nn.Module, second: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether an input of this shape passes with all its positions, or becomes factors for its channels, though the
    second layer sees a mean of them.
    """
    seen: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].numel() // (2 * _inputs(layer)))

    tensors = {name: each.to("meta") for name, each in [*module.named_parameters(), *module.named_buffers()]}
    handle = second.register_forward_pre_hook(count)
    try:
        with torch.no_grad():
            output = functional_call(module, tensors, (torch.empty(shape, device="meta"),))
    except Exception:  # noqa: BLE001 (whatever a module of the user's raises, it does not take this shape)
        return False
    finally:
        handle.remove()
    if not isinstance(output, Tensor) or output.ndim != len(shape) or not seen:
        return False
    kept = output.numel() > max(output.shape[1:]) * 2
    # Factors for the channels of an image, by which someone else multiplies.
    factors = len(shape) == 4 and output.numel() == max(output.shape[1:]) * 2
    return (kept or factors) and max(seen) == 1
