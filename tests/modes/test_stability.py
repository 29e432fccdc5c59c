"""Matching of dictionaries from several seeds."""

import itertools

import pytest
import torch

from codec_dist.modes import ModesError, match_dictionaries


def test_a_permuted_rescaled_dictionary_is_matched_exactly():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(12, 20, generator=generator)
    order = torch.randperm(12, generator=generator)
    match = match_dictionaries(first, first[order] * 37.5)
    assert order[match.partner].tolist() == list(range(12))
    torch.testing.assert_close(match.cosine, torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_sum_of_cosines_is_the_highest_of_all_permutations():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    cosines = torch.nn.functional.cosine_similarity(first[:, None].double(), second[None].double(), dim=2)
    best = max(sum(float(cosines[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    match = match_dictionaries(first, second)
    assert float(match.cosine.sum()) == pytest.approx(best)
    assert sorted(match.partner.tolist()) == list(range(5))


def test_modes_without_partner_and_zero_modes_are_marked():
    match = match_dictionaries(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    assert match.partner.tolist() == [-1, 0, -1]
    assert match.cosine[0].isnan()
    zero = match_dictionaries(torch.zeros(1, 2), torch.eye(2))
    assert zero.cosine.tolist() == [0.0]


def test_dictionaries_of_other_layers_are_refused():
    with pytest.raises(ModesError, match="2 and 3 channels"):
        match_dictionaries(torch.eye(2), torch.eye(3))
