"""Specificity and coverage against closed forms and definitions written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codec_dist.modes import coverage, specificity

NAN = float("nan")


def test_a_mode_of_one_class_is_fully_specific():
    correlation = torch.full((10, 1), -0.1)
    correlation[3] = 0.8
    found = specificity(correlation)
    assert [float(x) for x in (found.entropy, found.gini, found.top1_mass, found.top5_mass)] == pytest.approx(
        [1, 1 - 1 / 10, 1, 1]
    )


@pytest.mark.parametrize("sharing", [1, 2, 5, 8])
def test_a_mode_shared_by_some_classes_has_the_closed_form(sharing):
    correlation = torch.zeros(8, 1)
    correlation[:sharing] = 0.3
    found = specificity(correlation)
    assert float(found.entropy) == pytest.approx(1 - math.log(sharing) / math.log(8))
    assert float(found.gini) == pytest.approx(1 - sharing / 8)
    assert float(found.top1_mass) == pytest.approx(1 / sharing)
    assert float(found.top5_mass) == pytest.approx(min(1, 5 / sharing))


@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(-1, 1)))
def test_specificity_equals_the_definitions(values):
    found = specificity(torch.from_numpy(values))
    for mode in range(4):
        positive = np.maximum(values[:, mode], 0)
        if positive.sum() < 1e-300:
            continue
        share = positive / positive.sum()
        entropy = -sum(p * math.log(p) for p in share if p > 0)
        differences = sum(abs(a - b) for a in share for b in share)
        assert float(found.entropy[mode]) == pytest.approx(1 - entropy / math.log(6), abs=1e-9)
        assert float(found.gini[mode]) == pytest.approx(differences / (2 * 6), abs=1e-9)
        assert float(found.top5_mass[mode]) == pytest.approx(np.sort(share)[-5:].sum(), abs=1e-9)


def test_specificity_is_undefined_without_a_positive_correlation():
    correlation = torch.tensor([[-0.1, 0.0, NAN], [-0.2, 0.0, NAN]])
    for values in vars(specificity(correlation)).values():
        assert values.isnan().all()
    assert specificity(torch.tensor([[0.5]])).entropy.isnan().all()  # log 1 = 0
    assert specificity(torch.zeros(0, 3)).gini.isnan().all()


def test_classes_without_samples_do_not_count_as_classes():
    correlation = torch.tensor([[0.4, 0.1], [NAN, NAN], [0.4, 0.3]])
    without = correlation[[0, 2]]
    for found, expected in zip(
        vars(specificity(correlation)).values(), vars(specificity(without)).values(), strict=True
    ):
        assert found.tolist() == expected.tolist()
    assert coverage(correlation).by_mode.tolist() == coverage(without).by_mode.tolist()


def test_coverage_curves_average_sorted_correlations():
    correlation = torch.tensor([[0.9, 0.1, NAN, 0.4], [NAN] * 4, [0.2, -0.3, NAN, 0.5]], dtype=torch.float64)
    found = coverage(correlation)
    assert found.by_class.tolist() == pytest.approx([(0.9 + 0.5) / 2, (0.4 + 0.2) / 2, (0.1 - 0.3) / 2])
    assert found.by_mode.tolist() == pytest.approx([(0.9 + 0.1 + 0.5) / 3, (0.2 - 0.3 + 0.4) / 3])


def test_coverage_without_any_correlation_is_empty():
    assert len(coverage(torch.full((2, 3), NAN)).by_class) == len(coverage(torch.zeros(0, 3)).by_mode) == 0
