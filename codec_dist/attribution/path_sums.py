"""Sums along the path: Σ ½ (g_a + g_b) ⊙ (h_a - h_b) over neighbouring points, without keeping the points.

On a CPU the elementwise work is bound by memory, and done as plain tensor operations it is a seventh of the
time of a ResNet-50's steps. So it goes through the tensors in pieces that stay in the cache, and reads
and writes main memory once per operand.

On a GPU the trapezoid sum, its split by sign and the sum over positions are one Triton kernel (:func:`split_path`):
every h and g of the path is read once, and only the two results are written. Done as tensor operations with a
running sum, the same work moves three to four times as many bytes.
"""

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.reductions import Reduction, Split

# Numbers of one piece. With five tensors of 6.4 million numbers, on 2 cores with 1 MB of second-level cache each and
# 32 MB of third level: 2^16 took 14 ms, 2^17 to 2^21 8 to 10 ms, whole tensors 29 ms. Few pieces also mean few
# meetings of the threads, which are slow on a busy machine.
PIECE = 1 << 19

Hidden = Float[Tensor, "batch ..."]
PointHidden = Float[Tensor, "points ..."]

Points = Sequence[Float[Tensor, "batch channels positions"]]


class HiddenTotal(ABC):
    """Contributions of one site: numbers of the hidden tensor's shape, ready to be reduced."""

    @abstractmethod
    def split(self, reduction: Reduction) -> Split:
        """Positive and negative parts [batch, channels]."""

    @abstractmethod
    def total(self) -> Float[Tensor, "batch"]:
        """Sum over all positions and channels."""

    @abstractmethod
    def values(self) -> Hidden:
        """The contributions themselves."""


class WholeTotal(HiddenTotal):
    """Contributions that are there as a tensor."""

    def __init__(self, values: Hidden) -> None:
        self._values = values

    def split(self, reduction: Reduction) -> Split:
        """Split by sign at each position, then summed."""
        return reduction.split(self._values)

    def total(self) -> Float[Tensor, "batch"]:
        """Sum over everything but the batch."""
        return self._values.flatten(1).sum(dim=1)

    def values(self) -> Hidden:
        """The tensor."""
        return self._values


class RunningSum(HiddenTotal):
    """The sum over the path so far, and the last point; memory does not depend on the number of points."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._sum: Tensor | None = None

    def add(self, hidden: PointHidden, gradient: PointHidden) -> None:
        """Go on to the next point, from x towards x₀; a point of one sample serves the whole batch."""
        if self._last is not None:
            upper_hidden, upper_gradient = self._last
            if self._sum is None:
                kind = torch.promote_types(upper_hidden.dtype, torch.float32)
                self._sum = torch.zeros_like(upper_hidden, dtype=kind)
            add_trapezoid_(self._sum, upper_hidden, upper_gradient, hidden, gradient)
        self._last = hidden, gradient

    def split(self, reduction: Reduction) -> Split:
        """Split by sign at each position, then summed, a few samples at a time."""
        values = self.values()
        samples = max(1, PIECE // max(1, values[0].numel()))
        if values.is_cuda or samples >= len(values):
            return reduction.split(values)
        parts = [reduction.split(piece) for piece in values.split(samples)]
        return torch.cat([positive for positive, _ in parts]), torch.cat([negative for _, negative in parts])

    def total(self) -> Float[Tensor, "batch"]:
        """Sum over everything but the batch."""
        return WholeTotal(self.values()).total()

    def values(self) -> Hidden:
        """The sum; two points at least have been added."""
        assert self._sum is not None
        return self._sum


class FusedSum(HiddenTotal):
    """All points of the path, kept on a GPU until one kernel reads each once."""

    def __init__(self) -> None:
        self._hidden: list[Tensor] = []
        self._gradient: list[Tensor] = []

    def add(self, hidden: PointHidden, gradient: PointHidden) -> None:
        """Go on to the next point, from x towards x₀; a point of one sample serves the whole batch."""
        self._hidden.append(hidden)
        self._gradient.append(gradient)

    def split(self, reduction: Reduction) -> Split:
        """Split by sign at each position, then summed, by one kernel."""
        batch = len(self._hidden[0])
        hidden = [reduction.arrange(point).expand(batch, -1, -1) for point in self._hidden]
        gradient = [reduction.arrange(point).expand(batch, -1, -1) for point in self._gradient]
        positive, negative = split_path(hidden, gradient)
        if reduction.mean:
            positions = hidden[0].shape[2]
            return positive / positions, negative / positions
        return positive, negative

    def total(self) -> Float[Tensor, "batch"]:
        """Sum over everything but the batch, by the same kernel."""
        positive, negative = self.split(Reduction(_any_arrangement))
        return (positive + negative).sum(dim=1)

    def values(self) -> Hidden:
        """The sum at each position, point by point."""
        running = RunningSum()
        for hidden, gradient in zip(self._hidden, self._gradient, strict=True):
            running.add(hidden, gradient)
        return running.values()


def _any_arrangement(values: Hidden) -> Float[Tensor, "batch first rest"]:
    """Three dimensions without a copy, whatever they mean."""
    return values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)


def add_trapezoid_(
    total: Hidden, upper_hidden: Hidden, upper_gradient: Hidden, lower_hidden: PointHidden, lower_gradient: PointHidden
) -> None:
    """Add ½ (g_upper + g_lower) ⊙ (h_upper - h_lower) to ``total``.

    Args:
        total: of float32 or wider; changed in place.
        upper_hidden: h at the upper point, shaped like ``total``; narrower types are widened.
        upper_gradient: ∂T/∂h alike.
        lower_hidden: h at the lower point, alike, or of one sample that serves the whole batch.
        lower_gradient: ∂T/∂h alike.
    """
    operands = [total, upper_gradient, lower_gradient, upper_hidden, lower_hidden]
    flat = None if total.is_cuda else [_flat(tensor, total) for tensor in operands]
    if flat is None or any(tensor is None for tensor in flat):
        change = upper_hidden.to(total.dtype) - lower_hidden.to(total.dtype)
        total.addcmul_(change, upper_gradient.to(total.dtype) + lower_gradient.to(total.dtype), value=0.5)
        return
    samples, width = total.shape[0], total[0].numel()
    rows, columns = max(1, PIECE // max(1, width)), min(PIECE, width)
    change, slope = total.new_empty(rows, columns), total.new_empty(rows, columns)
    for row in range(0, samples, rows):
        for column in range(0, width, columns):
            _add_piece(flat, slice(row, row + rows), slice(column, column + columns), change, slope)


def _add_piece(flat: list[Tensor | None], rows: slice, columns: slice, change: Tensor, slope: Tensor) -> None:
    sums, *others = (tensor[rows if len(tensor) > 1 else slice(None), columns] for tensor in flat if tensor is not None)
    upper_gradient, lower_gradient, upper_hidden, lower_hidden = (other.to(sums.dtype) for other in others)
    change, slope = change[: sums.shape[0], : sums.shape[1]], slope[: sums.shape[0], : sums.shape[1]]
    torch.add(upper_gradient, lower_gradient, out=slope)
    torch.sub(upper_hidden, lower_hidden, out=change)
    sums.addcmul_(change, slope, value=0.5)


def _flat(tensor: Tensor, like: Tensor) -> Tensor | None:
    """A view [samples, numbers] in the order of memory, if that order is the one of ``like``."""
    width = like[0].numel()
    sizes, strides = (tensor.shape[1:], tensor.stride()[1:])
    same = sizes == like.shape[1:] and all(
        size == 1 or own_stride == wanted_stride
        for size, own_stride, wanted_stride in zip(sizes, strides, like.stride()[1:])
    )
    if not same or not _is_dense(sizes, strides):
        return None
    between = tensor.stride(0) if tensor.shape[0] > 1 else width
    return tensor.as_strided((tensor.shape[0], width), (between, 1), tensor.storage_offset())


def _is_dense(sizes: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether one sample's numbers fill a stretch of memory without gaps."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


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


PathSum = RunningSum | FusedSum


def path_sum_for(device: torch.device, *, fused: bool = True) -> Callable[[], PathSum]:
    """The kind of sum that is fastest on ``device``; without the fused kernel if that is not wanted."""
    return FusedSum if fused and can_fuse(device) else RunningSum


def fused_difference(points: Sequence[tuple[Tensor, Tensor]], reduction: Reduction) -> float:
    """How far the fused kernel is from plain operations: norm of the difference over that of the contributions.

    Args:
        points: h and ∂T/∂h [batch, ...] of one layer at two points of a path or more, from x towards x₀; a point of one
            sample serves the whole batch.
        reduction: how the layer is reduced.
    """
    fused, plain = FusedSum(), RunningSum()
    for hidden, gradient in points:
        fused.add(hidden, gradient)
        plain.add(hidden, gradient)
    found, expected = torch.cat(fused.split(reduction)), torch.cat(plain.split(reduction))
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
