"""From a mode map to a picture: the image seen through a mask (docs/method.md §7)."""

import math

import numpy as np
from jaxtyping import Float, UInt8

from codec_dist.visualization.errors import VisualizationError

REFERENCE_SIZE = 224


def scaled_filter_width(width_at_224: int, height: int, width: int) -> int:
    """Width in pixels of the median filter for an image of this size; 1 means no filter.

    The setting is meant at 224 pixels and scales with the shorter side.
    """
    return max(1, round(width_at_224 * min(height, width) / REFERENCE_SIZE))


def render_mask(
    mode_map: Float[np.ndarray, "colour height width"], median_filter: int = 4, contrast: float = 7.0
) -> Float[np.ndarray, "height width"]:
    """How strongly each pixel shows, in [0, 1].

    |M| → median filter per colour → mean over colours → min–max → × contrast → clip (docs/method.md §7).

    Args:
        mode_map: map M = G ⊙ x of one image.
        median_filter: width of the filter at 224 pixels, see :func:`scaled_filter_width`. An even width
            reaches one pixel further up and left, and takes the upper of the two middle values.
        contrast: factor before clipping.

    Raises:
        VisualizationError: the map is not finite, the width is negative, or the contrast not positive.
    """
    if median_filter < 0 or not contrast > 0:
        raise VisualizationError(f"median filter {median_filter}, contrast {contrast}: choose ≥ 0 and > 0")
    if not np.isfinite(mode_map).all():
        raise VisualizationError("the mode map holds values that are nan or infinite: check the model's output")
    strength = np.abs(mode_map).astype(np.float64)
    size = scaled_filter_width(median_filter, *strength.shape[1:])
    if size > 1:
        from scipy.ndimage import median_filter as filter_median

        strength = filter_median(strength, size=(1, size, size), mode="reflect")
    mean = strength.mean(axis=0)
    spread = mean.max() - mean.min()
    if spread <= 0:
        return np.zeros_like(mean)
    return np.clip(contrast * ((mean - mean.min()) / spread), 0, 1)


def render_picture(
    image: Float[np.ndarray, "colour height width"], mask: Float[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width colour"]:
    """The un-normalised image (values in [0, 1]) times the mask, as bytes.

    Raises:
        VisualizationError: the image has neither one colour nor three.
    """
    if image.shape[0] not in (1, 3):
        raise VisualizationError(f"an image of {image.shape[0]} colours cannot be drawn: expected 1 or 3")
    return to_bytes(image * mask)


def to_bytes(image: Float[np.ndarray, "colour height width"]) -> UInt8[np.ndarray, "height width colour"]:
    """Values in [0, 1] (clipped) as bytes, colours last."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def enlarge(
    picture: UInt8[np.ndarray, "height width colour"], minimum: int
) -> UInt8[np.ndarray, "height2 width2 colour"]:
    """Repeat pixels a whole number of times until the shorter side has at least ``minimum``."""
    factor = max(1, math.ceil(minimum / min(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
