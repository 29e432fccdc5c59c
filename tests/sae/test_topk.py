"""TopK against an obvious reimplementation, and what it is for."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from codec_dist.sae import (
    LinearAutoencoder,
    SaeError,
    StackedAutoencoder,
    TopKAutoencoder,
    build,
    geometric_median,
    topk,
)


def make(dead: int = 0, **options: object) -> tuple[TopKAutoencoder, torch.Tensor]:
    """A float64 SAE with trained-looking (untied) weights, of which the first ``dead`` modes count as dead."""
    sae = build("topk", {"modes": 12, "k": 3, "dead_window": 100, **options}, channels=5, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder_bias):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.samples_since_fired[:dead] = 100
    rows = 3 * torch.rand(9, 5, generator=generator, dtype=torch.float64)
    sae.scale = 2.0
    return sae, rows


def reference(sae: TopKAutoencoder, rows: torch.Tensor, dead: int) -> tuple[np.ndarray, torch.Tensor]:
    """Loadings and loss, mode by mode; the auxiliary term written as a surrogate with the stated gradient."""
    loadings = np.zeros((len(rows), sae.modes))
    errors, auxiliary = [], []
    for number, row in enumerate(rows / 2.0):
        preactivation = [(row - sae.decoder_bias) @ sae.encoder[m] + sae.encoder_bias[m] for m in range(sae.modes)]
        strongest = sorted(range(sae.modes), key=lambda m: -preactivation[m].item())[: sae.k]
        approximation = sae.decoder_bias
        for mode in strongest:
            if preactivation[mode] > 0:
                loadings[number, mode] = preactivation[mode].item()
                approximation = approximation + preactivation[mode] * sae.decoder[mode]
        error = row - approximation
        errors.append(error)
        helpers = sorted(range(dead), key=lambda m: -preactivation[m].item())[: sae.auxk]
        rest = error.detach()
        for mode in helpers:
            value = preactivation[mode]
            # ReLU forward, identity backward
            rest = rest - (value if value > 0 else value - value.detach()) * sae.decoder[mode]
        auxiliary.append(rest)
    loss = torch.stack(errors).square().mean()
    if dead and sae.auxk:
        loss = loss + sae.auxk_coefficient * torch.stack(auxiliary).square().mean()
    return loadings, loss


@pytest.mark.parametrize(("dead", "auxk"), [(0, 2), (2, 3), (6, 3), (6, 0)])
def test_loadings_loss_and_gradients_equal_the_definition(dead: int, auxk: int) -> None:
    sae, rows = make(dead, auxk=auxk)
    expected_loadings, expected_loss = reference(sae, rows, dead)
    expected = torch.autograd.grad(expected_loss, list(sae.parameters()))
    loss = sae.loss(rows).total
    found = torch.autograd.grad(loss, list(sae.parameters()))
    np.testing.assert_allclose(sae.encode(rows).detach(), expected_loadings, rtol=1e-12)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_decode_returns_stored_units() -> None:
    sae, rows = make()
    loadings = sae.encode(rows)
    torch.testing.assert_close(sae(rows), 2.0 * (loadings @ sae.dictionary + sae.decoder_bias))


def test_loadings_are_nonnegative_and_at_most_k() -> None:
    sae, rows = make()
    loadings = sae.encode(10 * rows - 5)
    assert (loadings >= 0).all()
    assert ((loadings > 0).sum(1) <= 3).all()


def test_dictionary_rows_have_unit_norm_after_steps() -> None:
    sae, rows = make()
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.after_step()  # the start is of unit norm in float32 only
    for _ in range(3):
        optimizer.zero_grad()
        sae.loss(rows).total.backward()
        sae.before_step()
        along = (sae.decoder.grad * sae.decoder).sum(1)
        torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
        optimizer.step()
        sae.after_step()
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_start_is_tied_and_biased_to_the_geometric_median() -> None:
    sae = build("topk", {"modes": 12, "k": 3}, channels=5)
    rows = torch.rand(50, 5)
    sae.calibrate(rows, 0.5)
    torch.testing.assert_close(sae.encoder, sae.decoder)
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(sae.decoder_bias.detach(), geometric_median(rows / 0.5))


def test_geometric_median_minimizes_the_sum_of_distances() -> None:
    points = np.random.default_rng(0).exponential(size=(40, 3))
    best = minimize(lambda p: np.linalg.norm(points - p, axis=1).sum(), points.mean(0), method="Nelder-Mead")
    found = geometric_median(torch.from_numpy(points))
    assert np.linalg.norm(points - found.numpy(), axis=1).sum() <= best.fun * (1 + 1e-6)


def test_dead_window_counts_samples_since_a_mode_fired() -> None:
    sae, rows = make()
    for step in range(1, 12):
        sae.loss(rows)
        sae.after_step()
        fired = (sae.encode(rows) > 0).any(0)
        assert (sae.samples_since_fired[~fired] == 9 * step).all()
        assert (sae.samples_since_fired[fired] == 0).all()
    assert (~fired).any()
    sae.loss(rows)
    sae.after_step()
    torch.testing.assert_close(sae.dead, ~fired)


def train(sae: TopKAutoencoder, rows: torch.Tensor, steps: int, rate: float = 2e-3, batch: int = 256) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        sae.loss(rows[torch.randint(len(rows), (batch,), generator=generator)]).total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()


def mixtures(atoms: torch.Tensor, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    on = torch.rand(rows, len(atoms), generator=generator).argsort(1) < 2
    return (on * (0.5 + torch.rand(rows, len(atoms), generator=generator))) @ atoms


@pytest.mark.parametrize("auxk", [None, 0])
def test_auxk_revives_dead_modes(auxk: int | None) -> None:
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(10, 16), dim=1)
    rows = mixtures(atoms, 2048)
    sae = build("topk", {"modes": 10, "k": 2, "auxk": auxk, "dead_window": 1000}, channels=16)
    sae.calibrate(rows, rows.std().item())
    with torch.no_grad():
        sae.encoder_bias[:5] = -20  # negative for every row: neither TopK nor ReLU passes a gradient
    assert not (sae.encode(rows) > 0).any(0)[:5].any()
    train(sae, rows, 800, rate=1e-2)
    alive = (sae.encode(rows) > 0).any(0)[:5].sum()
    assert alive == (0 if auxk == 0 else 5)


def test_recovers_a_known_sparse_dictionary() -> None:
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(12, 24), dim=1)
    rows = mixtures(atoms, 4096)
    sae = build("topk", {"modes": 16, "k": 2, "dead_window": 2000}, channels=24, seed=3)
    sae.calibrate(rows, rows.std().item())
    train(sae, rows, 1000, rate=5e-3)
    cosine = (atoms @ sae.dictionary.T).amax(1)
    assert (cosine >= 0.9).all(), cosine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": 4, "k": 5}, "between 1 and the number of modes, 4"),
        ({"k": 2.5}, "refuses its options {'k': 2.5}"),
        ({"mods": 5}, "did you mean modes"),
        ({"modes": 4, "k": 1, "dead_window": 0}, "dead_window"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SaeError, match=message):
        build("topk", options, channels=8)


@pytest.mark.parametrize("auxk", [2, 30])
@pytest.mark.parametrize("dead", [0, 7])
@pytest.mark.parametrize("members", [0, 3])
@pytest.mark.parametrize("bias", ["zero", "none"])
def test_sparse_products_equal_dense_ones(
    bias: str, members: int, dead: int, auxk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "SPARSE_ELEMENTS", 1)
    options = {"modes": 40, "k": 3, "decoder_bias": bias, "auxk": auxk}
    saes = [build("topk", options, 5, seed=s).double() for s in range(members or 1)]
    for number, one in enumerate(saes[:2]):  # in a stack: of one member other modes, of another none
        one.samples_since_fired[3 * number : 3 * number + dead] = 10_000
    rows = torch.rand(members or 1, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sae = StackedAutoencoder(saes).template if members else saes[0]
    rows = rows if members else rows[0]
    assert isinstance(sae, TopKAutoencoder)
    assert sae._sparse_pays()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    found, expected = sae.loss(rows).total, None
    statistics = sae.statistics.clone()
    parts = LinearAutoencoder.loss(sae, rows)
    assert ("auxiliary" in parts.parts) == (dead > 0) == ("auxiliary" in sae.loss(rows).parts)
    expected = parts.total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(statistics, sae.statistics)
    gradients = [torch.autograd.grad(loss.sum(), list(sae.parameters())) for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


def test_sparse_products_are_for_few_loadings_and_large_dictionaries() -> None:
    def sparse(name: str = "topk", modes: int = 512, k: int = 3, channels: int = 64) -> bool:
        sae = build(name, {"modes": modes, "k": k}, channels=channels)
        assert isinstance(sae, TopKAutoencoder)
        return sae._sparse_pays()

    assert sparse()
    assert not sparse(k=65)
    assert not sparse(modes=256)
    assert not sparse("batchtopk")
