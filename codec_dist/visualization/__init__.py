"""Pictures: which pixels of an image a mode follows on its way to a class (docs/method.md §7)."""

from codec_dist.visualization.drawing import GallerySample, ModeGallery, draw_mode_maps
from codec_dist.visualization.errors import VisualizationError
from codec_dist.visualization.maps import ModeMaps, mode_maps
from codec_dist.visualization.rendering import render_mask, render_picture, scaled_filter_width

__all__ = [
    "GallerySample",
    "ModeGallery",
    "ModeMaps",
    "VisualizationError",
    "draw_mode_maps",
    "mode_maps",
    "render_mask",
    "render_picture",
    "scaled_filter_width",
]
