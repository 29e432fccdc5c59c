"""PCA and NMF behind the interface of the SAEs, against scikit-learn and scipy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import NMF, PCA

from codec_dist.sae import FittedAutoencoder, SaeError, SparseAutoencoder, build


def data(rows: int = 300, channels: int = 8) -> torch.Tensor:
    generator = np.random.default_rng(0)
    loadings = generator.exponential(size=(rows, 4)) * (generator.random((rows, 4)) < 0.5)
    return torch.from_numpy(loadings @ generator.random((4, channels)) + 0.05 * generator.random((rows, channels)))


def make(name: str, rows: torch.Tensor, **options: object) -> FittedAutoencoder:
    sae = build(name, options, rows.shape[1]).double()
    assert isinstance(sae, FittedAutoencoder)
    sae.calibrate(rows[:50], rows.std(correction=0).item())
    return sae


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_components_loadings_and_variances_are_those_of_pca(offset: float) -> None:
    rows = data() - 0.5 + offset
    sae = make("pca", rows, modes=3, scaling="none")
    sae.fit(rows.split(37))
    expected = PCA(3, svd_solver="full").fit(rows.numpy())
    # Signs are a convention: here the largest entry is positive.
    signs = np.sign(expected.components_[range(3), np.abs(expected.components_).argmax(1)])[:, None]
    np.testing.assert_allclose(sae.dictionary, expected.components_ * signs, atol=1e-8)
    np.testing.assert_allclose(sae.encode(rows), expected.transform(rows.numpy()) * signs.T, atol=1e-7)
    reconstruction = expected.inverse_transform(expected.transform(rows.numpy()))
    np.testing.assert_allclose(sae(rows), reconstruction, rtol=1e-9, atol=1e-9)
    # scikit-learn divides by n − 1
    np.testing.assert_allclose(sae.variances, expected.explained_variance_ * 299 / 300, rtol=1e-8)


def test_explained_variance_of_pca_is_the_share_of_its_eigenvalues() -> None:
    rows = data()
    sae = make("pca", rows, modes=2)
    sae.fit([rows])
    whole = make("pca", rows)
    whole.fit([rows])
    assert sae.metrics([rows]).ev == pytest.approx((sae.variances.sum() / whole.variances.sum()).item(), abs=1e-12)


def test_pca_keeps_the_k_largest_loadings() -> None:
    rows = data()
    sae, whole = make("pca", rows, k=2), make("pca", rows)
    for one in (sae, whole):
        one.fit([rows])
    kept, scores = sae.encode(rows).numpy(), whole.encode(rows).numpy()
    for row, every in zip(kept, scores, strict=True):
        largest = np.argsort(-np.abs(every))[:2]
        np.testing.assert_allclose(row[largest], every[largest])
        assert np.count_nonzero(row) == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_nmf_is_as_good_as_scikit_learns_and_flips_negative_rows(sign: int) -> None:
    rows = sign * data()
    sae = make("nmf", rows, modes=4)
    sae.fit(rows.split(64))
    absolute = rows.abs().numpy()
    expected = NMF(4, init="nndsvda", max_iter=500, random_state=0)
    error = np.linalg.norm(absolute - expected.fit_transform(absolute) @ expected.components_)
    assert (sae(rows) - rows).norm().item() <= 1.01 * error
    assert (sae.encode(rows) >= 0).all()
    assert (sign * sae.dictionary >= 0).all()
    torch.testing.assert_close(sae.atoms().norm(dim=1), torch.ones(4).double())


def test_loadings_of_nmf_are_nonnegative_least_squares() -> None:
    rows = data()
    sae = make("nmf", rows, modes=5, scaling="none", iterations=3000)
    sae.fit([rows])
    found = sae.encode(rows[:40]).numpy()
    for row, loadings in zip(rows[:40].numpy(), found, strict=True):
        best, residual = nnls(sae.atoms().numpy().T, row)
        assert np.linalg.norm(row - loadings @ sae.atoms().numpy()) <= residual + 1e-6
        np.testing.assert_allclose(loadings, best, atol=1e-3)


def test_nmf_holds_no_more_rows_than_allowed_and_draws_them_evenly() -> None:
    rows = data(2000)
    sae = make("nmf", rows, modes=4, max_rows=200)
    sae.fit(rows.split(300))
    assert sae.metrics([rows]).ev > 0.95


def test_rows_of_both_signs_are_refused_by_nmf() -> None:
    rows = data()
    rows[:, 2] -= 1
    sae = make("nmf", rows, modes=4)
    with pytest.raises(SaeError, match="channel 2 has both"):
        sae.fit([rows])


@pytest.mark.parametrize("name", ["pca", "nmf"])
def test_baselines_are_saved_and_loaded_as_saes(tmp_path: Path, name: str) -> None:
    rows = data()
    sae = make(name, rows, modes=4)
    with pytest.raises(SaeError, match="was not fitted"):
        sae.encode(rows)
    with pytest.raises(SaeError, match="no rows"):
        sae.fit([])
    sae.fit([rows])
    sae.save(tmp_path)
    loaded = SparseAutoencoder.load(tmp_path)
    torch.testing.assert_close(loaded(rows), sae(rows), rtol=0, atol=0)
    assert loaded.loss(rows).total.item() == pytest.approx(
        ((rows - sae(rows)) / sae.scale).square().mean().item(), rel=1e-9
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pca", {"modes": 9}, "at most 8 components"),
        ("pca", {"modes": 4, "k": 5}, "between 1 and the number of modes, 4"),
        ("nmf", {"max_rows": 0}, "max_rows"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SaeError, match=message):
        build(name, options, channels=8)
