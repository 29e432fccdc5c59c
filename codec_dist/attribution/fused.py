"""All path points of one layer to the two per-channel sums, in one pass over memory.

The trapezoid sum, its split by sign and the sum over positions as one Triton kernel: every h and g of the path
is read once, and only the two results are written. Done as tensor operations with a running sum, the same work
moves three to four times as many bytes.

:func:`split_path_reference` is the same function in plain torch.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

Points = Sequence[Float[Tensor, "batch channels positions"]]
Split = tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether the kernel runs on ``device``: tried once, on very little."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    points = [torch.ones(1, 1, 1, device=device), torch.zeros(1, 1, 1, device=device)]
    try:
        return float(_kernel().split_path_fused(points, points)[0]) == 0.5
    except Exception as error:  # noqa: BLE001  no compiler, an old GPU: whatever it is, the plain way works
        warnings.warn(f"the fused kernel does not run on {device}, plain operations do: {error}", stacklevel=2)
        return False


def split_path(hidden: Points, gradient: Points) -> Split:
    """Positive and negative parts of Σ ½ (g_a + g_b) ⊙ (h_a - h_b) over neighbouring points a, b.

    Args:
        hidden: h at each point of the path, from x to x₀; two points or more. Any strides; samples may be
            expanded from one.
        gradient: ∂T/∂h alike.

    Returns:
        Both parts [batch, channels], split at each position and then summed over positions; float32, or float64
        if that is what comes in.
    """
    if can_fuse(hidden[0].device):
        return _kernel().split_path_fused(hidden, gradient)
    return split_path_reference(hidden, gradient)


def split_path_reference(hidden: Points, gradient: Points) -> Split:
    """:func:`split_path` in plain torch."""
    kind = torch.promote_types(hidden[0].dtype, torch.float32)
    total = torch.zeros(hidden[0].shape, dtype=kind, device=hidden[0].device)
    for upper in range(len(hidden) - 1):
        change = hidden[upper].to(kind) - hidden[upper + 1].to(kind)
        total.addcmul_(change, gradient[upper].to(kind) + gradient[upper + 1].to(kind), value=0.5)
    return total.clamp(min=0).sum(dim=2), total.clamp(max=0).sum(dim=2)


@cache
def _kernel() -> ModuleType:
    # Importing Triton takes a second, and it is not there on every machine.
    from codec_dist.attribution import fused_kernel

    return fused_kernel
