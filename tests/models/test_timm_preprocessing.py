"""Images are prepared as timm's own evaluation transform prepares them, for every kind of weights that it lists."""

import functools
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config

from codec_dist.config import ModelSection, PreprocessingSettings
from codec_dist.models import load_model
from codec_dist.models.published import from_timm
from codec_dist.models.settings import from_settings, to_settings


@functools.cache
def published() -> list[dict]:
    """The distinct evaluation settings of all weights in timm's registry."""
    found = {}
    for name in timm.list_pretrained():
        config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        found[str(sorted(config.items()))] = config
    return list(found.values())


@functools.cache
def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def pixels_of_timm(config: dict, image: Image.Image) -> torch.Tensor:
    return create_transform(**config)(image)


def test_all_published_settings_give_the_pixels_of_timm() -> None:
    assert {config["crop_mode"] for config in published()} == {"center", "squash", "border"}
    assert any(config["input_size"][1] != config["input_size"][2] for config in published())
    for number, config in enumerate(published()):
        preprocessing = from_timm(config)
        assert preprocessing is not None
        # Long and tall, smaller and larger than the input, odd and even.
        for image in (picture(311 + number, 200), picture(97, 230 + number)):
            assert torch.equal(preprocessing(image), pixels_of_timm(config, image)), config


@given(
    width=st.integers(12, 90),
    height=st.integers(12, 90),
    size=st.tuples(st.integers(8, 48), st.integers(8, 48)),
    square=st.booleans(),
    crop_pct=st.floats(0.6, 1.2),
    crop_mode=st.sampled_from(["center", "squash", "border"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_any_settings_give_the_pixels_of_timm(
    width: int,
    height: int,
    size: tuple[int, int],
    square: bool,
    crop_pct: float,
    crop_mode: str,
    interpolation: str,
    mean: tuple[float, ...],
) -> None:
    config = {
        "input_size": (3, size[0], size[0] if square else size[1]),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": mean,
        "std": (0.2, 0.3, 0.4),
    }
    preprocessing = from_timm(config)
    assert preprocessing is not None
    image = picture(width, height)
    assert torch.equal(preprocessing(image), pixels_of_timm(config, image))
    # What a run's config keeps gives the same again.
    settings = PreprocessingSettings.model_validate_json(to_settings(preprocessing, "timm").model_dump_json())
    assert from_settings(settings) == preprocessing


def test_grey_images_get_a_grey_border() -> None:
    settings = PreprocessingSettings(size=(8, 20), crop="border", channels=1, mean=(0.5,), std=(0.25,))
    image = from_settings(settings)(Image.new("L", (10, 10), 255))
    assert image.shape == (1, 8, 20)
    # 8 × 8 pixels of white between six columns of the mean on each side.
    assert torch.equal(image[0, :, 6:14], torch.full((8, 8), 2.0))
    border = torch.cat([image[0, :, :6], image[0, :, 14:]], dim=1)
    torch.testing.assert_close(border, torch.full((8, 12), (128 / 255 - 0.5) / 0.25))


def test_size_of_a_model_for_oblong_images_is_among_its_options() -> None:
    options = {"img_size": [32, 64], "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 4}
    loaded = load_model(ModelSection(spec="timm:vit_tiny_patch16_224", weights="none", options=options))
    assert loaded.preprocessing.shape == (3, 32, 64)
    assert loaded.preprocessing.resize == (math.floor(32 / 0.9), math.floor(64 / 0.9))
    assert loaded.classes == 1000


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels_than_those_of_the_metadata_need_settings(in_chans: int) -> None:
    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    assert from_timm({**config, "input_size": (in_chans, 32, 32)}) is None
