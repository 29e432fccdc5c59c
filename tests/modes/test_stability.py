"""Matching of dictionaries from several seeds."""

import itertools
from pathlib import Path

import pytest
import torch

from codec_dist.modes import (
    ModesError,
    match_dictionaries,
    read_stability,
    stability_over_seeds,
    write_stability,
)


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


def test_stability_is_the_mean_over_other_seeds_of_the_best_matching():
    """Against every permutation of every pair."""
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = stability_over_seeds(seeds, [torch.ones(4, dtype=torch.bool)] * 3)
    for one, dictionary in enumerate(seeds):
        expected = torch.zeros(4, dtype=torch.float64)
        for other in {0, 1, 2} - {one}:
            cosines = torch.nn.functional.cosine_similarity(dictionary[:, None], seeds[other][None], dim=2)
            best = max(itertools.permutations(range(4)), key=lambda p, c=cosines: float(c[range(4), p].sum()))
            expected += cosines[range(4), best] / 2
        torch.testing.assert_close(found[one], expected)


def test_dead_modes_take_no_partner_from_the_living():
    # The dead mode of the second dictionary lies where the first's mode is.
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    one, other = stability_over_seeds([first, second], [torch.tensor([True]), torch.tensor([False, True])])
    assert one.tolist() == pytest.approx([0.6])
    assert other[0].isnan()
    assert float(other[1]) == pytest.approx(0.6)


def test_one_seed_has_no_stability():
    with pytest.raises(ModesError, match="at least two seeds"):
        stability_over_seeds([torch.eye(2)], [torch.ones(2, dtype=torch.bool)])


def test_stability_survives_its_file(tmp_path: Path):
    values = torch.tensor([0.5, torch.nan, 1.0], dtype=torch.float64)
    write_stability(tmp_path, values, {"a-s0": "hash"})
    torch.testing.assert_close(read_stability(tmp_path), values, equal_nan=True)
    assert read_stability(tmp_path, {"a-s0": "other"}) is None
    assert read_stability(tmp_path / "elsewhere") is None
    (tmp_path / "stability.json").write_text("{}")
    with pytest.raises(ModesError, match="run `codec-dist train` again"):
        read_stability(tmp_path)
