"""Reductions split by sign at each position first, and then sum positions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.attribution import AttributionError, Attributor
from codec_dist.attribution.reductions import make_reduction
from codec_dist.models import LayerKey


def reduce(values: Tensor, reduction: str | None = None, model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    return make_reduction(model or nn.Identity(), LayerKey("x", reduction=reduction)).split(values)


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple),
    mean=st.booleans(),
    seed=st.integers(0, 100),
)
def test_default_equals_a_loop_over_positions(shape: tuple[int, ...], mean: bool, seed: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = reduce(values, "mean" if mean else None)
    channel_axis = 2 if len(shape) == 3 else 1
    expected = np.zeros((2, shape[0], shape[channel_axis]))
    for index, value in np.ndenumerate(values.numpy()):
        expected[int(value < 0), index[0], index[channel_axis]] += value
    if mean:
        expected /= np.prod(shape) / shape[0] / shape[channel_axis]
    for sign in (0, 1):
        np.testing.assert_allclose(found[sign].numpy(), expected[sign], atol=1e-12)


def test_cancelling_positions_do_not_cancel() -> None:
    positive, negative = reduce(torch.tensor([[[[3.0, -3.0]]]]))
    assert (positive.item(), negative.item()) == (3.0, -3.0)


def test_channels_last_sums_height_and_width() -> None:
    values = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(reduce(values, "channels_last")[0], values.clamp(min=0).sum((1, 2)))


def test_heads_sum_tokens_and_head_dimensions(vit: tuple[nn.Module, Tensor]) -> None:
    model, _ = vit
    values = torch.randn(2, 17, 32)
    found = make_reduction(model, LayerKey("blocks.0.attn.proj", True, "heads")).split(values)
    expected = torch.stack([values[:, :, 8 * head : 8 * head + 8].clamp(min=0).sum((1, 2)) for head in range(4)], 1)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        ("blocks.0:tokens", r"layer blocks\.0:tokens is \[2, 8, 16, 16\]: tokens needs \[batch, tokens, channels\]"),
        ("blocks.0:median", "unknown reduction 'median': .*mean"),
        ("blocks.0:heads", "`heads` needs the input of an attention's output projection"),
        ("head:channels_last", "channels_last needs four dimensions"),
    ],
)
def test_a_reduction_that_does_not_fit_is_refused(cnn: tuple[nn.Module, Tensor], layer: str, cause: str) -> None:
    model, images = cnn
    with pytest.raises(AttributionError, match=cause):
        Attributor(model, [layer])(images)


class Spectrum(nn.Module):
    """Nothing that tells channels from positions acts on what it returns."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.fft.fftn(images, dim=(1, 2, 3)).abs()


def test_where_the_channels_are_is_asked_for_if_it_cannot_be_known() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Spectrum(), nn.Flatten(), nn.Linear(384, 2))
    images = torch.randn(2, 3, 10, 10)
    with pytest.raises(AttributionError, match="say so by 1:channels_first or 1:channels_last"):
        Attributor(model, ["1"])(images)
    assert Attributor(model, ["1:channels_last"])(images)["1:channels_last"].positive.shape == (2, 8)
    assert Attributor(model, ["1:channels_first"])(images)["1:channels_first"].positive.shape == (2, 6)


class Queries(nn.Module):
    """Has a layer whose tensor does not grow with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.pool, self.head = nn.Embedding(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        queries = self.pool(self.queries.weight[None])
        return self.head((queries * images.flatten(1)[:, None]).sum(1))


def test_a_layer_without_a_row_for_each_image_is_refused() -> None:
    with pytest.raises(AttributionError, match=r"layer pool is .* for 2 images: its first dimension must be the batch"):
        Attributor(Queries(), ["pool"])(torch.randn(3, 3, 2, 2))
