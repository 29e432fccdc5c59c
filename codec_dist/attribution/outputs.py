"""The form that a model's output must have."""

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.errors import AttributionError


def checked_output(output: object, batch: int) -> Float[Tensor, "batch outputs"]:
    """The output if it has the form [batch, outputs].

    Raises:
        AttributionError: it has another form.
    """
    if not isinstance(output, Tensor):
        raise AttributionError(f"the model returns a {type(output).__name__}: wrap it to return [batch, outputs]")
    if output.ndim != 2 or output.shape[0] != batch:
        raise AttributionError(
            f"the model's output is {list(output.shape)} for {batch} images: targets need [batch, outputs]"
        )
    return output


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.float() if tensor.dtype in HALF else tensor


HALF = (torch.float16, torch.bfloat16)
