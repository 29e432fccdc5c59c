"""One-pass class correlations equal two-pass ones, however the samples are cut, ordered and merged."""

import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_dist.modes import LoadingCorrelations, ModesError
from codec_dist.statistics import StatisticsError

MODES, CLASSES, ROWS = 7, 5, 80
DEAD, CONSTANT, RARE = 2, 3, 4


@st.composite
def cuts(draw, rows=ROWS):
    """Row ranges that cover all rows, some of them empty, in a random order of merging."""
    places = sorted(draw(st.lists(st.integers(0, rows), max_size=6)))
    return draw(st.permutations(list(itertools.pairwise([0, *places, rows]))))


def make_samples(seed, offset=0.0):
    """Loadings with a dead, a constant and a once-firing mode; labels with −1 and without the last class."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(ROWS, MODES, generator=generator).clamp(min=0) * torch.logspace(-3, 3, MODES) + offset
    loadings[:, DEAD], loadings[:, CONSTANT], loadings[:, RARE] = 0, 0.1, 0
    labels = torch.randint(-1, CLASSES - 1, (ROWS,), generator=generator)
    loadings[int((labels >= 0).nonzero()[0]), RARE] = 3
    return loadings, labels


def fold(loadings, labels, ranges):
    parts = []
    for start, stop in ranges:
        part = LoadingCorrelations(MODES, CLASSES)
        part.update(loadings[start:stop], labels[start:stop])
        parts.append(part)
    return functools.reduce(lambda first, second: first.merge(second), parts).result()


def pearson(loading, mask):
    """What numpy says; nan where either is constant."""
    if len(set(loading)) == 1 or len(set(mask)) == 1:
        return np.nan
    return np.corrcoef(loading, mask)[0, 1]


@given(seed=st.integers(0, 5), ranges=cuts(), offset=st.sampled_from([0.0, -1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_correlation_equals_corrcoef_with_class_masks(seed, ranges, offset):
    loadings, labels = make_samples(seed, offset)
    result = fold(loadings, labels, ranges)
    labelled = (labels >= 0).numpy()
    # The oracle sees centred values, because its own mean would cost it digits where the offset is large.
    values = (loadings.double() - loadings.double().mean(dim=0)).numpy()[labelled]
    values[:, CONSTANT] = 0
    classes = labels.numpy()[labelled]
    expected = [[pearson(values[:, m], classes == c) for m in range(MODES)] for c in range(CLASSES)]
    np.testing.assert_allclose(result.correlation, expected, rtol=0, atol=1e-10 if offset else 1e-13)
    assert result.correlation[:, [DEAD, CONSTANT]].isnan().all()
    assert result.correlation[CLASSES - 1].isnan().all()
    assert result.samples == labelled.sum()
    assert result.class_samples.tolist() == [int((classes == c).sum()) for c in range(CLASSES)]


@given(seed=st.integers(0, 5), ranges=cuts())
@settings(max_examples=20, deadline=None)
def test_frequency_and_mean_count_unlabelled_rows_too(seed, ranges):
    loadings, labels = make_samples(seed)
    result = fold(loadings, labels, ranges)
    assert result.rows == ROWS > result.samples
    for mode in range(MODES):
        on = loadings[:, mode][loadings[:, mode] != 0].double().numpy()
        assert float(result.frequency[mode]) == len(on) / ROWS
        if mode == DEAD:
            assert result.mean_when_on[mode].isnan()
        else:
            assert float(result.mean_when_on[mode]) == pytest.approx(on.mean(), rel=1e-12)


@given(
    seed=st.integers(0, 5),
    groups=st.lists(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=8), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_concept_correlation_equals_corrcoef_with_the_union_of_classes(seed, groups):
    loadings, labels = make_samples(seed)
    result = fold(loadings, labels, [(0, 30), (30, ROWS)]).of_groups(groups)
    labelled = (labels >= 0).numpy()
    values, classes = loadings.double().numpy()[labelled], labels.numpy()[labelled]
    assert result.shape == (len(groups), MODES)
    for row, group in zip(result, groups, strict=True):
        expected = [pearson(values[:, m], np.isin(classes, group)) for m in range(MODES)]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_perfect_and_inverse_modes_have_correlation_1_and_minus_1():
    labels = torch.tensor([0, 0, 1, 1, 1])
    accumulator = LoadingCorrelations(2, 2)
    accumulator.update(torch.tensor([[9.0, 1], [9, 1], [4, 2], [4, 2], [4, 2]]), labels)
    torch.testing.assert_close(
        accumulator.result().correlation, torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_a_loading_that_varies_only_off_the_labelled_rows_has_no_correlation():
    accumulator = LoadingCorrelations(1, 2)
    accumulator.update(torch.tensor([[0.3], [0.3], [0.3], [7.0]]), torch.tensor([0, 1, 1, -1]))
    assert accumulator.result().correlation.isnan().all()


@pytest.mark.parametrize("labels", [[], [-1, -1, -1], [1, 1, 1]])
def test_no_rows_no_labels_or_one_class_give_no_correlation_and_no_warning(labels):
    accumulator = LoadingCorrelations(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulator.update(torch.rand(len(labels), 2), torch.tensor(labels, dtype=torch.int64))
        result = accumulator.result()
        assert result.correlation.shape == (3, 2)
        assert result.correlation.isnan().all()
        assert result.of_groups([[0, 1]]).isnan().all()
    assert result.frequency.isnan().all() == (not labels)


def test_data_without_classes_have_frequencies_only():
    accumulator = LoadingCorrelations(2, 0)
    accumulator.update(torch.tensor([[1.0, 0.0]]), torch.tensor([-1]))
    assert accumulator.result().correlation.shape == (0, 2)
    assert accumulator.result().frequency.tolist() == [1, 0]


@pytest.mark.parametrize("label", [-2, 3])
def test_label_that_is_no_class_is_refused(label):
    with pytest.raises(ModesError, match=f"label {label} found where there are 3 classes"):
        LoadingCorrelations(2, 3).update(torch.zeros(2, 2), torch.tensor([0, label]))


def test_unfit_loadings_and_merges_are_refused():
    with pytest.raises(ModesError, match="5 modes given where there are 2"):
        LoadingCorrelations(2, 3).update(torch.zeros(1, 5), torch.tensor([0]))
    with pytest.raises(StatisticsError, match=r"column 1 .*nan"):
        LoadingCorrelations(2, 3).update(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))
    with pytest.raises(ModesError, match="merged"):
        LoadingCorrelations(2, 3).merge(LoadingCorrelations(2, 4))
    with pytest.raises(ModesError, match="there are 3 classes"):
        LoadingCorrelations(2, 3).result().of_groups([[0, 3]])
