"""Images are prepared as timm's own evaluation transform prepares them, for every kind of weights that it lists."""

import functools

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from codec_dist.config import ModelSection
from codec_dist.models import Preprocessing
from codec_dist.models.sources import timm_preprocessing


@functools.cache
def published() -> list[dict]:
    """The distinct evaluation settings of all weights in timm's registry."""
    found = {}
    for name in timm.list_pretrained():
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        found[str(sorted(config.items()))] = config
    return list(found.values())


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)
