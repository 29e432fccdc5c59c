"""The highest loadings of each mode, whatever the batches and the order of merging."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codec_dist.modes import ModesError, TopImages

ROWS, MODES = 30, 3


@given(
    # Few different values, so that most places are decided by ties.
    loadings=hnp.arrays(np.float32, (ROWS, MODES), elements=st.sampled_from([0.0, 0.0, 0.5, 0.75, 1.0, -1.0])),
    places=st.lists(st.integers(0, ROWS), max_size=5),
    count=st.integers(1, 8),
    random=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_top_images_equal_a_full_sort(loadings, places, count, random):
    samples = np.array(random.sample(range(1000), ROWS))
    parts = []
    for start, stop in itertools.pairwise([0, *sorted(places), ROWS]):
        part = TopImages(MODES, count)
        part.update(torch.from_numpy(loadings[start:stop]), torch.from_numpy(samples[start:stop]))
        parts.append(part)
    random.shuffle(parts)
    found = functools.reduce(lambda first, second: first.merge(second), parts).result()
    expected = []
    for mode in range(MODES):
        firing = [(-loading, sample) for loading, sample in zip(loadings[:, mode], samples, strict=True) if loading > 0]
        for rank, (loading, sample) in enumerate(sorted(firing)[:count]):
            expected.append((mode, rank, sample, -loading))
    assert list(zip(found.mode, found.rank, found.sample, found.loading, strict=True)) == expected


def test_a_batch_larger_than_a_step_is_sorted_whole():
    loadings = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    top = TopImages(2, 5)
    top.update(loadings, torch.arange(5000, 6000))
    for mode in range(2):
        best = np.argsort(-loadings[:, mode].numpy(), kind="stable")[:5] + 5000
        assert top.result().sample[top.result().mode == mode].tolist() == best.tolist()


def test_a_mode_that_never_fires_has_no_images():
    top = TopImages(2, 5)
    top.update(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([7, 8]))
    assert (top.result().mode.tolist(), top.result().sample.tolist()) == ([1], [7])


def test_other_modes_are_refused():
    with pytest.raises(ModesError, match="3 modes given where there are 2"):
        TopImages(2, 5).update(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ModesError, match="merged"):
        TopImages(2, 5).merge(TopImages(2, 6))
