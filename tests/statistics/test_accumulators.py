"""Accumulators equal two-pass float64 oracles, however the data are cut, ordered and merged."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import PCA

from codec_dist.statistics import (
    ClassMeans,
    DistributionAccumulator,
    LayerStatistics,
    Moments,
    SignCorrelation,
    StatisticsError,
    hoyer,
    sign_correlation,
)

CHANNELS, CLASSES = 6, 4


@st.composite
def cuts(draw, rows):
    """Row ranges that cover all rows, some of them empty, in a random order of merging."""
    places = sorted(draw(st.lists(st.integers(0, rows), max_size=6)))
    ranges = list(itertools.pairwise([0, *places, rows]))
    return draw(st.permutations(ranges))


def make_rows(seed, rows=60):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, CHANNELS, generator=generator) * torch.logspace(-3, 3, CHANNELS)
    labels = torch.randint(-1, CLASSES, (rows,), generator=generator)
    positive, negative = values.clamp(min=0), torch.randn(rows, CHANNELS, generator=generator).clamp(max=0)
    positive[::7] = 0  # samples without any positive contribution
    negative[::14] = 0  # of which some have none at all
    return positive, negative, labels


def folded(accumulators):
    return functools.reduce(lambda first, second: first.merge(second), accumulators)


@given(seed=st.integers(0, 5), ranges=cuts(60))
@settings(max_examples=40, deadline=None)
def test_layer_statistics_equal_two_passes_over_all_rows(seed, ranges):
    positive, negative, labels = make_rows(seed)
    parts = []
    for start, stop in ranges:
        part = LayerStatistics(CHANNELS, CLASSES)
        part.update(positive[start:stop], negative[start:stop], labels[start:stop])
        parts.append(part)
    result = folded(parts).result()

    net = (positive.double() + negative.double()).numpy()
    sparsity = hoyer(torch.from_numpy(net)).numpy()
    sparsity = sparsity[~np.isnan(sparsity)]
    numbers = result.numbers()
    assert numbers["samples"] == 60
    assert result.hoyer.samples == len(sparsity)
    assert result.hoyer.undefined == 60 - len(sparsity) > 0
    assert numbers["hoyer_mean"] == pytest.approx(sparsity.mean(), abs=1e-12)
    for name, fraction in [("hoyer_q1", 0.25), ("hoyer_median", 0.5), ("hoyer_q3", 0.75)]:
        assert numbers[name] == pytest.approx(np.quantile(sparsity, fraction), abs=1 / 1000 + 1e-9)

    balance = [
        -stats.pearsonr(n, p).statistic
        for p, n in zip(positive.double().numpy(), negative.double().numpy(), strict=True)
        if np.ptp(p) and np.ptp(n)
    ]
    assert result.sign_correlation.samples == len(balance)
    assert numbers["ei_mean"] == pytest.approx(np.mean(balance), abs=1e-12)
    assert numbers["ei_median"] == pytest.approx(np.quantile(balance, 0.5), abs=2 / 1000 + 1e-9)

    np.testing.assert_array_equal(result.channel_minimum, net.min(axis=0))
    np.testing.assert_array_equal(result.channel_range, np.ptp(net, axis=0))
    means = np.stack([net[labels.numpy() == c].mean(axis=0) for c in range(CLASSES)])
    np.testing.assert_allclose(result.class_means.means, means, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.class_means.class_correlation, np.corrcoef(means), rtol=0, atol=1e-9)
    pca = PCA().fit(means)
    curve = np.cumsum(pca.explained_variance_ratio_)[: CLASSES - 1]
    np.testing.assert_allclose(result.class_means.cumulative_variance, curve, atol=1e-9)
    assert numbers["components_95"] == int(np.argmax(curve >= 0.95)) + 1
    spectrum = pca.explained_variance_
    assert numbers["participation_ratio"] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum(), rel=1e-9)


@given(ranges=cuts(60), offset=st.sampled_from([0.0, 1.0, 1e6, -1e9]))
@settings(max_examples=40, deadline=None)
def test_variance_survives_a_mean_far_larger_than_the_deviation(ranges, offset):
    values = make_rows(3)[0].double() + offset
    parts = []
    for start, stop in ranges:
        part = Moments(CHANNELS)
        part.update(values[start:stop])
        parts.append(part)
    moments = folded(parts)
    np.testing.assert_allclose(moments.mean, values.numpy().mean(axis=0), rtol=1e-12, atol=1e-12)
    # Even two passes know a value only to its own rounding, and so a variance to (rounding · deviation).
    rounding = abs(offset) * 1e-15
    np.testing.assert_allclose(
        moments.variance().sqrt(), values.numpy().std(axis=0), rtol=1e-10, atol=1e-12 + 10 * rounding
    )


def test_constant_column_is_told_exactly():
    moments = Moments(2)
    for _ in range(50):
        moments.update(torch.tensor([[0.1, 0.1], [0.1, 0.1 + 1e-7]], dtype=torch.float64))
    assert moments.constant.tolist() == [True, False]
    assert moments.variance()[0] == 0
    assert moments.variance()[1] == pytest.approx(0.25e-14, rel=1e-6)


@given(
    values=st.lists(st.one_of(st.floats(-1, 1), st.just(float("nan"))), max_size=80),
    fraction=st.floats(0, 1),
    bins=st.sampled_from([1, 7, 1000]),
)
def test_quantile_is_within_one_bin_of_numpy(values, fraction, bins):
    distribution = DistributionAccumulator(-1.0, 1.0, bins)
    distribution.update(torch.tensor(values, dtype=torch.float64))
    defined = [value for value in values if value == value]
    found = distribution.quantile(fraction)
    if not defined:
        assert found is None
        return
    assert abs(found - np.quantile(defined, fraction)) <= 2 / bins + 1e-12
    assert min(defined) <= found <= max(defined)
    result = distribution.result()
    assert int(result.histogram.sum()) == result.samples == len(defined)
    assert result.undefined == len(values) - len(defined)


def test_sign_correlation_is_1_when_balanced_and_minus_1_when_opposed():
    positive = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    assert float(sign_correlation(positive, -2 * positive)) == pytest.approx(1, abs=1e-15)
    assert float(sign_correlation(positive, positive - 5)) == pytest.approx(-1, abs=1e-15)


def test_sign_correlation_is_undefined_where_a_sign_is_absent():
    statistics = SignCorrelation()
    statistics.update(torch.rand(3, 5), torch.zeros(3, 5))
    statistics.update(torch.zeros(2, 1), -torch.rand(2, 1))
    assert (statistics.result().samples, statistics.result().undefined, statistics.result().mean) == (0, 5, None)


def test_classes_without_samples_take_no_part():
    values = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 9.0]])
    some, three = ClassMeans(3, 5), ClassMeans(3, 2)
    some.update(values, torch.tensor([1, 3, -1]))
    three.update(values[:2], torch.tensor([0, 1]))
    result, expected = some.result(), three.result()
    assert result.class_samples.tolist() == [0, 1, 0, 1, 0]
    assert result.means[[0, 2, 4]].isnan().all()
    assert (result.components_95, result.participation_ratio) == (1, pytest.approx(1))
    assert result.cumulative_variance.tolist() == expected.cumulative_variance.tolist() == [1.0]
    assert result.class_correlation[1, 3] == expected.class_correlation[0, 1]
    assert result.class_correlation[0].isnan().all()


@pytest.mark.parametrize(("labels", "row"), [([-1, -1, -1], 1.0), ([0, 0, 0], 1.0), ([0, 1, 2], 0.1), ([0, 1, 1], 0.0)])
def test_dimensionality_is_undefined_without_two_different_class_means(labels, row):
    means = ClassMeans(4, 3)
    for _ in range(30):  # sums of 0.1 are not multiples of 0.1: what differs is rounding only
        means.update(torch.full((3, 4), row), torch.tensor(labels))
    result = means.result()
    assert (result.components_95, result.participation_ratio) == (None, None)
    assert len(result.cumulative_variance) == 0


def test_orthogonal_class_means_have_known_dimensionality():
    # n equal axes: n − 1 equal variances after centring.
    means = ClassMeans(100, 100)
    means.update(torch.eye(100), torch.arange(100))
    result = means.result()
    assert result.participation_ratio == pytest.approx(99)
    assert result.components_95 == 95  # 94/99 = .9495, 95/99 = .9596


def test_no_samples_and_no_classes_give_no_numbers():
    statistics = LayerStatistics(3, 0)
    numbers = statistics.result().numbers()
    assert numbers.pop("samples") == 0
    assert set(numbers.values()) == {None}
    assert statistics.result().channel_range.isnan().all()
    statistics.update(torch.rand(5, 3), -torch.rand(5, 3), torch.full((5,), -1))
    assert statistics.result().numbers()["hoyer_mean"] is not None
    assert statistics.result().class_means.means.shape == (0, 3)


@pytest.mark.parametrize("label", [-2, 4])
def test_label_that_is_no_class_is_refused(label):
    with pytest.raises(StatisticsError, match=f"label {label} found where there are 4 classes"):
        ClassMeans(2, 4).update(torch.zeros(2, 2), torch.tensor([0, label]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_column(value):
    rows = torch.zeros(3, 4)
    rows[1, 2] = value
    with pytest.raises(StatisticsError, match="column 2"):
        LayerStatistics(4, 2).update(rows, torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))


def test_accumulators_of_other_shapes_are_refused():
    with pytest.raises(StatisticsError):
        LayerStatistics(4, 2).merge(LayerStatistics(5, 2))
    with pytest.raises(StatisticsError):
        Moments(4).merge(Moments(5))
    with pytest.raises(StatisticsError):
        DistributionAccumulator(0.0, 1.0).merge(DistributionAccumulator(-1.0, 1.0))
    with pytest.raises(StatisticsError, match="outside the range"):
        DistributionAccumulator(0.0, 1.0).update(torch.tensor([1.5]))
