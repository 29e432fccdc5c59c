"""The real network at hand, in what needs neither its weights nor its photographs."""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.photographs import MissingError, Stamps, background, compose, is_photograph
from benchmarks.published import WeightsError, rename_in_order

SIDE, VISIBLE = 96, 80
RED = (255, 0, 0)


def _network(names: tuple[str, str, str]) -> nn.Module:
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return nn.Sequential(OrderedDict(zip(names, parts, strict=True))).eval()


def _photograph(seed: int = 0, side: int = 100) -> Image.Image:
    """Noise in the middle of a transparent square."""
    pixels = np.zeros((side, side, 4), np.uint8)
    inside = slice(side // 8, -side // 8)
    height = len(pixels[inside])
    pixels[inside, inside, :3] = np.random.default_rng(seed).integers(0, 256, (height, height, 3))
    pixels[inside, inside, 3] = 255
    return Image.fromarray(pixels)


def test_renamed_weights_compute_the_same() -> None:
    published, own = _network(("_conv", "_bn", "_fc")), _network(("stem", "bn1", "classifier"))
    own.load_state_dict(rename_in_order(published.state_dict(), own.state_dict()))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(own(images), published(images))


def test_weights_in_another_order_or_number_are_refused() -> None:
    own = _network(("stem", "bn1", "classifier")).state_dict()
    state = _network(("_conv", "_bn", "_fc")).state_dict()
    # Weight and bias of a BatchNorm are of one shape, so that their shapes alone would not tell them apart.
    names = list(state)
    weight, bias = names.index("_bn.weight"), names.index("_bn.bias")
    names[weight], names[bias] = names[bias], names[weight]
    with pytest.raises(WeightsError, match=r"_bn\.bias"):
        rename_in_order({name: state[name] for name in names}, own)
    misshaped = dict(state) | {"_fc.weight": torch.zeros(3, 4, 1, 1)}
    with pytest.raises(WeightsError, match=r"_fc\.weight is \[3, 4, 1, 1\]"):
        rename_in_order(misshaped, own)
    with pytest.raises(WeightsError, match=f"{len(state) - 1} tensors"):
        rename_in_order(dict(list(state.items())[:-1]), own)


@pytest.mark.parametrize("shape", [(40, 40), (120, 30), (15, 90)])
def test_a_stamp_lies_whole_in_the_central_square(shape: tuple[int, int]) -> None:
    height, width = shape
    stamp = Image.new("RGBA", (width + 20, height + 10))
    stamp.paste((*RED, 255), (7, 3, 7 + width, 3 + height))
    for seed in range(10):
        picture = compose(stamp, SIDE, VISIBLE, np.random.default_rng(seed))
        again = compose(stamp, SIDE, VISIBLE, np.random.default_rng(seed))
        assert picture.size == (SIDE, SIDE)
        assert picture.tobytes() == again.tobytes()
        # Backgrounds have no pure red.
        rows, columns = np.nonzero((np.asarray(picture) == RED).all(-1))
        margin = (SIDE - VISIBLE) // 2
        assert margin <= min(rows.min(), columns.min())
        assert max(rows.max(), columns.max()) < SIDE - margin
        found = (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
        assert 0.7 * VISIBLE - 1 <= max(found) <= VISIBLE
        assert len(rows) == found[0] * found[1]
        assert found[0] / found[1] == pytest.approx(height / width, rel=0.15)


def test_backgrounds_have_no_pure_colours_and_differ() -> None:
    made = [background(64, np.random.default_rng(seed)) for seed in range(20)]
    assert all(each.shape == (64, 64, 3) and each.dtype == np.uint8 for each in made)
    assert not any((each == RED).all(-1).any() for each in made)
    assert len({each.tobytes() for each in made}) == len(made)


def test_drawings_and_what_is_small_or_has_no_background_are_no_photographs() -> None:
    drawing = Image.new("RGBA", (100, 100))
    drawing.paste((0, 0, 255, 255), (10, 10, 60, 90))
    assert is_photograph(_photograph())
    assert not is_photograph(drawing)
    assert not is_photograph(_photograph(side=64))
    assert not is_photograph(_photograph().convert("RGB"))
    assert not is_photograph(Image.new("RGBA", (100, 100)))


def test_every_pass_takes_each_stamp_once_and_drawings_never(tmp_path: Path) -> None:
    for folder in ("animals", "food/cartoon", "symbols"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            _photograph(number).save(tmp_path / folder / f"{number}.png")
    made = Stamps(tmp_path, SIDE, VISIBLE, seed=1)
    names = [made.name(number) for number in range(12)]
    for turn in range(3):
        assert sorted(names[4 * turn : 4 * turn + 4]) == [f"animals/{number}" for number in range(4)]
    pictures = [made.picture(number).tobytes() for number in range(12)]
    assert len(set(pictures)) == 12
    assert Stamps(tmp_path, SIDE, VISIBLE, seed=1).picture(5).tobytes() == pictures[5]
    assert Stamps(tmp_path, SIDE, VISIBLE, seed=2).picture(5).tobytes() != pictures[5]


def test_a_folder_without_photographs_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="tuxpaint-stamps-default"):
        Stamps(tmp_path, SIDE, VISIBLE)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    _photograph().save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(MissingError, match=r"1\.png"):
        Stamps(tmp_path, SIDE, VISIBLE)
