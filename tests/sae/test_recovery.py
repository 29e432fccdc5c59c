"""Every learned architecture finds a known sparse dictionary: the benchmark in a smaller form."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.sae_recovery import RECIPES, Recipe, recover, smaller, synthesize

LEARNED = [recipe for recipe in RECIPES if recipe.architecture not in ("pca", "nmf")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LEARNED, ids=lambda recipe: recipe.architecture)
def test_a_known_dictionary_is_recovered(recipe: Recipe) -> None:
    found = recover(smaller(recipe))
    assert found.ev >= 0.95, found
    assert found.cosine >= 0.9, found


@pytest.mark.slow
def test_principal_components_are_no_dictionary() -> None:
    found = recover(smaller(next(recipe for recipe in RECIPES if recipe.architecture == "pca")))
    assert found.ev < 0.6
    assert found.cosine < 0.7


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.architecture)
def test_the_data_are_what_the_benchmark_says(recipe: Recipe) -> None:
    data = smaller(recipe).data
    atoms, rows, held_out = synthesize(data)
    assert (rows.shape, held_out.shape) == ((data.fit_rows, 32), (data.held_out_rows, 32))
    assert atoms.norm(dim=1).sub(1).abs().max() < 1e-5
    if data.nonnegative:
        assert (rows >= 0).all()
    if recipe.architecture == "stsae":
        assert (data.low, data.high, data.mean) == (recipe.options["threshold"], 1, 0)
