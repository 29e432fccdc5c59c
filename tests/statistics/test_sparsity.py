"""Promises of the Hoyer sparsity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codec_dist.statistics import HoyerStatistics, hoyer


@pytest.mark.parametrize("channels", [2, 3, 64, 2048])
def test_one_hot_is_1_and_uniform_is_0(channels):
    one_hot = torch.zeros(channels)
    one_hot[channels // 2] = -3.7
    uniform = torch.full((channels,), 0.1)
    uniform[::2] = -0.1
    assert hoyer(torch.stack([one_hot, uniform])).tolist() == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize(("channels", "active"), [(9, 4), (100, 1), (100, 25), (512, 7)])
def test_closed_form_for_equal_active_channels(channels, active):
    vector = torch.zeros(channels, dtype=torch.float64)
    vector[:active] = 5.0
    expected = (math.sqrt(channels) - math.sqrt(active)) / (math.sqrt(channels) - 1)
    assert float(hoyer(vector)) == pytest.approx(expected, abs=1e-14)


def test_all_zero_single_channel_and_non_finite_vectors_are_undefined():
    assert hoyer(torch.zeros(2, 5)).isnan().all()
    assert hoyer(torch.ones(4, 1)).isnan().all()
    assert hoyer(torch.ones(4, 0)).isnan().all()
    assert hoyer(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0]])).isnan().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_scale_does_not_matter_even_at_the_ends_of_the_number_range(scale):
    vectors = torch.randn(20, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hoyer(vectors * scale), hoyer(vectors), rtol=0, atol=1e-12)


@given(hnp.arrays(np.float32, (7, 11), elements=st.floats(-100, 100, width=32)))
def test_hoyer_equals_the_formula_and_lies_in_0_to_1(values):
    for vector, found in zip(values.astype(np.float64), hoyer(torch.from_numpy(values)).tolist(), strict=True):
        norm = np.abs(vector).max()
        if norm == 0:
            assert math.isnan(found)
            continue
        scaled = vector / norm
        expected = (math.sqrt(11) - np.abs(scaled).sum() / np.sqrt((scaled**2).sum())) / (math.sqrt(11) - 1)
        assert 0 <= found <= 1
        assert found == pytest.approx(expected, abs=1e-12)


def test_all_zero_vectors_are_counted_and_not_averaged():
    statistics = HoyerStatistics()
    statistics.update(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    result = statistics.result()
    assert (result.samples, result.undefined, result.mean) == (2, 2, pytest.approx(0.5))


def test_only_zero_vectors_give_no_numbers():
    statistics = HoyerStatistics()
    statistics.update(torch.zeros(3, 4))
    result = statistics.result()
    assert (result.samples, result.undefined, result.mean, result.median) == (0, 3, None, None)
