"""Which layers every path from input to output passes through."""

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.capture import Capture, same_strides
from codec_dist.attribution.outputs import checked_output
from codec_dist.models.layers import LayerKey


def find_cuts(capture: Capture, image: Float[Tensor, "one ..."]) -> dict[LayerKey, bool]:
    """Whether each captured site is a cut: with h replaced by a detached leaf, T has no gradient to x.

    One forward pass serves all sites: in its autograd graph, h becomes a leaf by not going past its node.
    """
    start = same_strides(image.detach().requires_grad_())
    output, hidden = capture(start)
    end = checked_output(output, image.shape[0]).grad_fn
    return {site: not _connected(end, start.grad_fn, without=tensor.grad_fn) for site, tensor in hidden.items()}


def _connected(end: torch.autograd.graph.Node | None, start: object, without: object) -> bool:
    """Whether a path of the autograd graph leads from ``end`` to ``start``, other than through ``without``."""
    remaining, seen = [end], {end}
    while remaining:
        node = remaining.pop()
        if node is None or node is without:
            continue
        if node is start:
            return True
        following = {parent for parent, _ in node.next_functions} - seen
        seen |= following
        remaining.extend(following)
    return False
