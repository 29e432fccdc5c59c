"""Numbers that the channels of rows are divided by."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST_SHARE = 1e-3


def channel_scales(
    rows: Float[Tensor, "rows channels"],
    deviations: Float[Tensor, "channels"],
    scale: float,
    *,
    per_channel: bool,
    flip: bool,
) -> Float[Tensor, "channels"]:
    """One divisor per channel.

    Args:
        rows: some rows, for their signs.
        deviations: standard deviation of each channel; used where ``per_channel``, but never less than a
            thousandth of ``scale``, so that channels which hardly vary are not blown up to noise.
        scale: standard deviation over everything.
        per_channel: divide by deviations; else by 1.
        flip: give channels whose values are all ≤ 0 a negative divisor, so that they become ≥ 0.
    """
    divisors = deviations.clamp(min=SMALLEST_SHARE * scale) if per_channel else torch.ones_like(deviations)
    if flip:
        highest, lowest = rows.amax(0).to(divisors), rows.amin(0).to(divisors)
        divisors = torch.where((highest <= 0) & (lowest < 0), -divisors, divisors)
    return divisors
