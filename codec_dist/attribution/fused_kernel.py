"""The Triton kernel behind :func:`codec_dist.attribution.path_sums.split_path`."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

Points = Sequence[Float[Tensor, "batch channels positions"]]
Split = tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch channels"]]

CHANNELS, POSITIONS = 32, 32
# Positions of one program: enough programs to fill a GPU with one image of 56², few enough partial sums.
POSITIONS_PER_PROGRAM = 512
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}


def split_path_fused(hidden: Points, gradient: Points) -> Split:
    """As :func:`codec_dist.attribution.path_sums.split_path`, on the device of the tensors."""
    hidden, gradient = _of_one_form(hidden), _of_one_form(gradient)
    batch, channels, positions = hidden[0].shape
    device = hidden[0].device
    pieces = triton.cdiv(positions, POSITIONS_PER_PROGRAM)
    kind = torch.promote_types(hidden[0].dtype, torch.float32)
    # Partial sums, added afterwards in a fixed order: atomics would make results differ between runs.
    parts = torch.empty(2, pieces, batch, channels, dtype=kind, device=device)
    grid = (batch, triton.cdiv(channels, CHANNELS), pieces)
    # Triton launches on the current device, which need not be the one of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _launch(grid, hidden, gradient, parts)
    positive, negative = parts.sum(dim=1)
    return positive, negative


def _launch(grid: tuple[int, ...], hidden: Sequence[Tensor], gradient: Sequence[Tensor], parts: Tensor) -> None:
    batch, channels, positions = hidden[0].shape
    _split_path_kernel[grid](
        _table(hidden),
        _table(gradient),
        parts[0],
        parts[1],
        len(hidden),
        batch,
        channels,
        positions,
        *hidden[0].stride()[1:],
        *gradient[0].stride()[1:],
        HIDDEN_TYPE=TYPES[hidden[0].dtype],
        GRADIENT_TYPE=TYPES[gradient[0].dtype],
        SUM_TYPE=TYPES[parts.dtype],
        CHANNELS=CHANNELS,
        POSITIONS=POSITIONS,
        POSITIONS_PER_PROGRAM=POSITIONS_PER_PROGRAM,
    )


def _of_one_form(points: Points) -> list[Tensor]:
    """The points with one type and one pair of strides for channels and positions."""
    kind = points[0].dtype
    strides = {point.stride()[1:] for point in points}
    if len(strides) == 1 and all(point.dtype == kind for point in points):
        return list(points)
    return [point.to(kind).contiguous() for point in points]


def _table(points: Sequence[Tensor]) -> Tensor:
    """Address and distance between samples of each point, [points, 2]."""
    entries = [[point.data_ptr(), point.stride(0)] for point in points]
    return torch.tensor(entries, dtype=torch.int64, device=points[0].device)


@triton.jit
def _split_path_kernel(  # type: ignore[no-untyped-def]
    hidden_table,
    gradient_table,
    positive,
    negative,
    points,
    batch,
    channels,
    positions,
    hidden_channel_stride,
    hidden_position_stride,
    gradient_channel_stride,
    gradient_position_stride,
    HIDDEN_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    POSITIONS_PER_PROGRAM: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    piece = tl.program_id(2)
    positive_sum = tl.zeros([CHANNELS], dtype=SUM_TYPE)
    negative_sum = tl.zeros([CHANNELS], dtype=SUM_TYPE)
    for start in range(0, POSITIONS_PER_PROGRAM, POSITIONS):
        position = piece * POSITIONS_PER_PROGRAM + start + tl.arange(0, POSITIONS)
        inside = (position[:, None] < positions) & (channel[None, :] < channels)
        hidden_at = (
            position[:, None].to(tl.int64) * hidden_position_stride
            + channel[None, :].to(tl.int64) * hidden_channel_stride
        )
        gradient_at = (
            position[:, None].to(tl.int64) * gradient_position_stride
            + channel[None, :].to(tl.int64) * gradient_channel_stride
        )
        total = tl.zeros([POSITIONS, CHANNELS], dtype=SUM_TYPE)
        upper_hidden = tl.zeros([POSITIONS, CHANNELS], dtype=SUM_TYPE)
        upper_gradient = tl.zeros([POSITIONS, CHANNELS], dtype=SUM_TYPE)
        for point in range(points):
            hidden = tl.load(hidden_table + 2 * point).to(tl.pointer_type(HIDDEN_TYPE))
            hidden += sample * tl.load(hidden_table + 2 * point + 1)
            gradient = tl.load(gradient_table + 2 * point).to(tl.pointer_type(GRADIENT_TYPE))
            gradient += sample * tl.load(gradient_table + 2 * point + 1)
            lower_hidden = tl.load(hidden + hidden_at, mask=inside, other=0.0).to(SUM_TYPE)
            lower_gradient = tl.load(gradient + gradient_at, mask=inside, other=0.0).to(SUM_TYPE)
            trapezoid = 0.5 * (upper_gradient + lower_gradient) * (upper_hidden - lower_hidden)
            # The first point has none above it.
            total += tl.where(point > 0, trapezoid, 0.0)
            upper_hidden = lower_hidden
            upper_gradient = lower_gradient
        positive_sum += tl.sum(tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL), axis=0)
        negative_sum += tl.sum(tl.minimum(total, 0.0, propagate_nan=tl.PropagateNan.ALL), axis=0)
    place = (piece.to(tl.int64) * batch + sample) * channels + channel
    tl.store(positive + place, positive_sum, mask=channel < channels)
    tl.store(negative + place, negative_sum, mask=channel < channels)
