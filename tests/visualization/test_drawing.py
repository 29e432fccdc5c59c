"""Galleries on disk: what is listed exists, and shows the image beside its map."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from codec_dist.visualization import (
    GallerySample,
    ModeGallery,
    VisualizationError,
    draw_mode_maps,
    mode_maps,
    render_mask,
)


def make_model(colours: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(colours, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, 3)).eval()


def denormalise(images: Tensor) -> Tensor:
    return (images * 0.5 + 0.5).clamp(0, 1)


def make_gallery(colours: int, count: int = 2, size: int = 12) -> ModeGallery:
    images = torch.rand(count, colours, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    samples = tuple(GallerySample("shard-000000.tar", f"image {i}", i or None, 2.0 - i) for i in range(count))
    return ModeGallery("1", "contribution-positive", 7, (0, 3), 2, samples, images)


@pytest.mark.parametrize(("colours", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_show_the_image_beside_the_masked_image(tmp_path: Path, colours: int, mode: str) -> None:
    model, gallery = make_model(colours), make_gallery(colours)
    entries = draw_mode_maps(tmp_path, model, [gallery], denormalise=denormalise, contrast=3.0)
    assert json.loads((tmp_path / "maps.json").read_text()) == entries
    maps = mode_maps(model, "1", gallery.images, [0, 3], 2).net.double().numpy()
    for rank, entry in enumerate(entries):
        shown = denormalise(gallery.images[rank]).numpy()
        expected = [shown, shown * render_mask(maps[rank], 4, 3.0)]
        with Image.open(tmp_path / entry["map"]) as both, Image.open(tmp_path / entry["image"]) as alone:
            assert both.mode == alone.mode == mode
            # 12 pixels are repeated 14 times to reach 160.
            assert (alone.size, both.size) == ((168, 168), (168 * 2 + 4, 168))
            pixels = np.asarray(both, dtype=float).reshape(168, 340, colours) / 255
            assert (np.asarray(alone).reshape(168, 168, colours) == pixels[:, :168] * 255).all()
        for side, image in zip((pixels[:, :168], pixels[:, 172:]), expected, strict=True):
            np.testing.assert_allclose(side[7::14, 7::14], image.transpose(1, 2, 0), atol=0.51 / 255)


def test_list_names_mode_sample_and_files(tmp_path: Path) -> None:
    galleries = [make_gallery(1), replace(make_gallery(1, 1), layer="1:mean", mode=0)]
    entries = draw_mode_maps(tmp_path, make_model(1), iter(galleries), denormalise=denormalise)
    assert [(e["layer"], e["mode"], e["rank"], e["label"]) for e in entries] == [
        ("1", 7, 0, None),
        ("1", 7, 1, 1),
        ("1:mean", 0, 0, None),
    ]
    assert entries[1] == {
        "layer": "1",
        "quantity": "contribution-positive",
        "mode": 7,
        "rank": 1,
        "shard": "shard-000000.tar",
        "key": "image 1",
        "label": 1,
        "loading": 1.0,
        "class": 2,
        "image": "maps/1/contribution-positive/mode-7/1-image.png",
        "map": "maps/1/contribution-positive/mode-7/1.png",
    }
    assert entries[2]["map"] == "maps/1%3Amean/contribution-positive/mode-0/0.png"
    on_disk = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert on_disk == {entry[name] for entry in entries for name in ("image", "map")}


def test_no_galleries_leave_an_empty_list(tmp_path: Path) -> None:
    assert draw_mode_maps(tmp_path, make_model(1), [], denormalise=denormalise) == []
    assert json.loads((tmp_path / "maps.json").read_text()) == []


def test_gallery_that_does_not_fit_itself_is_refused(tmp_path: Path) -> None:
    gallery = replace(make_gallery(1), samples=make_gallery(1).samples[:1])
    with pytest.raises(VisualizationError, match="1 samples but 2 images"):
        draw_mode_maps(tmp_path, make_model(1), [gallery], denormalise=denormalise)
    assert not (tmp_path / "maps.json").exists()
