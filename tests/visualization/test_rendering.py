"""From map to picture, against slow and obvious arithmetic."""

import numpy as np
import pytest

from codec_dist.visualization import VisualizationError, render_mask, render_picture, scaled_filter_width
from codec_dist.visualization.rendering import enlarge


def slow_median(values: np.ndarray, width: int) -> np.ndarray:
    """Upper median over a window that reaches width // 2 up and left; edges are mirrored."""
    before = width // 2
    padded = np.pad(values, ((before, width - 1 - before),) * 2, mode="symmetric")
    result = np.empty_like(values)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            window = np.sort(padded[row : row + width, column : column + width], axis=None)
            result[row, column] = window[len(window) // 2]
    return result


@pytest.mark.parametrize("colours", [1, 3])
def test_mask_is_filtered_averaged_stretched_and_clipped(colours: int) -> None:
    mode_map = np.random.default_rng(0).normal(size=(colours, 224, 230))
    mean = np.mean([slow_median(np.abs(colour), 4) for colour in mode_map], axis=0)
    expected = np.minimum((mean - mean.min()) / (mean.max() - mean.min()) * 2.5, 1)
    mask = render_mask(mode_map, median_filter=4, contrast=2.5)
    np.testing.assert_allclose(mask, expected, atol=1e-12)
    assert (mask.min(), mask.max()) == (0, 1)


def test_filter_scales_with_the_image() -> None:
    assert [scaled_filter_width(4, size, size) for size in (224, 448, 112, 16)] == [4, 8, 2, 1]
    assert scaled_filter_width(4, 224, 1000) == 4
    assert scaled_filter_width(0, 224, 224) == 1


def test_tiny_images_are_not_filtered() -> None:
    mode_map = np.random.default_rng(1).normal(size=(1, 16, 16))
    strength = np.abs(mode_map[0])
    expected = np.clip(7 * (strength - strength.min()) / np.ptp(strength), 0, 1)
    np.testing.assert_allclose(render_mask(mode_map), expected)


def test_constant_map_shows_nothing() -> None:
    assert not render_mask(np.full((3, 8, 8), -2.0)).any()


def test_picture_is_the_image_times_the_mask() -> None:
    image = np.array([[[1.0, 0.5]], [[0.0, 1.2]], [[0.2, 0.4]]])
    picture = render_picture(image, np.array([[1.0, 0.5]]))
    assert picture.tolist() == [[[255, 0, 51], [64, 153, 51]]]


def test_enlarging_repeats_pixels() -> None:
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    large = enlarge(picture, 5)
    assert large.shape == (6, 9, 1)
    assert (large[::3, ::3] == picture).all()
    assert (large == np.kron(picture, np.ones((3, 3, 1), np.uint8))).all()
    assert enlarge(picture, 2).shape == picture.shape


@pytest.mark.parametrize(
    "bad",
    [
        lambda: render_mask(np.full((1, 4, 4), np.nan)),
        lambda: render_mask(np.ones((1, 4, 4)), contrast=0.0),
        lambda: render_mask(np.ones((1, 4, 4)), median_filter=-1),
        lambda: render_picture(np.ones((2, 4, 4)), np.ones((4, 4))),
    ],
)
def test_what_cannot_be_drawn_is_refused(bad) -> None:
    with pytest.raises(VisualizationError):
        bad()
