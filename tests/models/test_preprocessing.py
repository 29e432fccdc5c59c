"""Preprocessing gives the very numbers of torchvision's reference evaluation transform, without torchvision."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Grayscale, InterpolationMode
from torchvision.transforms._presets import ImageClassification

from codec_dist.models import ModelError, Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(5, 90),
    height=st.integers(5, 90),
    size=st.integers(4, 40),
    resize=st.integers(4, 50),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
def test_equals_the_reference_transform_bit_by_bit(
    width: int, height: int, size: int, resize: int, interpolation: str
) -> None:
    reference = ImageClassification(
        crop_size=size, resize_size=resize, interpolation=InterpolationMode(interpolation), mean=MEAN, std=STD
    )
    image = noise(width, height)
    ours = Preprocessing(size, resize, interpolation, 3, MEAN, STD)(image)
    assert torch.equal(ours, reference(image))


def test_equals_timms_evaluation_transform() -> None:
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("vit_base_patch16_224").to_dict())
    reference = timm.data.create_transform(**config)
    ours = Preprocessing(224, int(224 / config["crop_pct"]), config["interpolation"], 3, config["mean"], config["std"])
    image = noise(320, 260)
    torch.testing.assert_close(ours(image), reference(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "I;16", "I", "F", "YCbCr", "RGB"])
def test_images_of_any_mode_are_those_of_torchvisions_loader_and_transform(mode: str) -> None:
    if mode in ("I;16", "I", "F"):
        values = np.arange(20 * 26).reshape(20, 26)  # beyond 255, as deep images are
        image = Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        image = noise(26, 20, mode)
    assert image.mode == mode
    loaded = image.convert("RGB")  # torchvision.datasets.folder.pil_loader
    reference = ImageClassification(crop_size=16, resize_size=18, mean=MEAN, std=STD)
    assert torch.equal(Preprocessing(16, 18, "bilinear", 3, MEAN, STD)(image), reference(loaded))
    grey = ImageClassification(crop_size=16, resize_size=18, mean=(0.4,), std=(0.2,))
    expected = grey(Grayscale(1)(loaded))
    assert torch.equal(Preprocessing(16, 18, "bilinear", 1, (0.4,), (0.2,))(image), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_many_images_together_are_what_each_is_alone(channels: int) -> None:
    preprocessing = Preprocessing(12, 14, "bilinear", channels, MEAN[:channels], STD[:channels])
    images = [noise(20, 30), noise(14, 14), noise(12, 12, "L"), noise(9, 40, "CMYK")]
    together = preprocessing.normalise([preprocessing.pixels(image) for image in images])
    assert torch.equal(together, torch.stack([preprocessing(image) for image in images]))
    assert together.is_contiguous(memory_format=torch.channels_last)


def test_a_thin_image_that_would_be_resized_to_a_huge_one_is_refused() -> None:
    image = Image.new("L", (1, 60_000))
    with pytest.raises(ModelError, match=r"1 × 60,000 pixels would be resized to 3,932,160,000 pixels"):
        Preprocessing(224, 256, "bilinear", 3, MEAN, STD)(image)
    assert Preprocessing(8, 8, "bilinear", 3, MEAN, STD)(image).shape == (3, 8, 8)


def test_denormalise_gives_the_colours_back() -> None:
    preprocessing = Preprocessing(16, 16, "bilinear", 3, MEAN, STD)
    image = noise(16, 16)
    colours = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(preprocessing.denormalise(preprocessing(image)), colours, rtol=0, atol=1e-6)
    batch = torch.full((2, 5, 3, 4, 4), 100.0)
    assert torch.equal(preprocessing.denormalise(batch), torch.ones_like(batch))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ModelError, match="mean has 3 values for 1 channels"):
        Preprocessing(16, 16, "bilinear", 1, MEAN, (1.0,))
    with pytest.raises(ModelError, match="'cubic' is not known: use nearest, bilinear, bicubic"):
        Preprocessing(16, 16, "cubic", 3, MEAN, STD)
    with pytest.raises(ModelError, match="must be above 0"):
        Preprocessing(16, 0, "bilinear", 3, MEAN, STD)
