"""Pictures: which pixels of an image a mode follows on its way to a class (METHOD §7)."""

from codec_dist.visualization.errors import VisualizationError
from codec_dist.visualization.rendering import render_mask, render_picture, scaled_filter_width

__all__ = ["VisualizationError", "render_mask", "render_picture", "scaled_filter_width"]
