"""The paper's SAE against a plain NumPy reimplementation."""

import numpy as np
import pytest
import torch

from codec_dist.sae import SaeError, StackedAutoencoder, StsaeAutoencoder, build

OPTIONS = {"hidden": 7, "expansion": 2, "threshold": 0.5, "l1": 0.01, "dropout": 0}


def make(**options: object) -> StsaeAutoencoder:
    sae = build("stsae", OPTIONS | options, channels=4, seed=2).double()
    sae.scale = 3.0
    return sae


def reference(sae: StsaeAutoencoder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Loadings, reconstruction and loss in stored units, scaled units and scaled units."""
    weights = {name: tensor.numpy() for name, tensor in sae.state_dict().items()}

    def layer(values: np.ndarray, name: str) -> np.ndarray:
        values = np.maximum(values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
        centred = values - values.mean(1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return normal * weights[f"{name}_norm.weight"] + weights[f"{name}_norm.bias"]

    hidden = layer(layer(rows / 3.0, "first"), "second")
    codes = 1 / (1 + np.exp(-hidden @ weights["codes.weight"].T))
    loadings = np.where(codes >= sae.threshold, codes, 0)
    atoms = np.maximum(weights["decoder"], 0) if sae.nonnegative else weights["decoder"]
    reconstruction = loadings @ atoms
    loss = ((rows / 3.0 - reconstruction) ** 2).mean() + sae.l1 * np.abs(atoms).mean()
    return loadings, reconstruction * 3.0, loss


@pytest.mark.parametrize("nonnegative", [False, True])
def test_loadings_reconstruction_and_loss_equal_the_definition(nonnegative: bool) -> None:
    sae, rows = make(nonnegative=nonnegative), np.random.default_rng(0).exponential(size=(6, 4))
    loadings, reconstruction, loss = reference(sae, rows)
    assert 0 < (loadings > 0).mean() < 1
    tensor = torch.from_numpy(rows)
    np.testing.assert_allclose(sae.encode(tensor).detach(), loadings, rtol=1e-12)
    np.testing.assert_allclose(sae(tensor).detach(), reconstruction, rtol=1e-12)
    np.testing.assert_allclose(sae.loss(tensor).total.item(), loss, rtol=1e-12)


def _penalty_alone(members: int) -> tuple[list[StsaeAutoencoder], torch.Tensor]:
    """SAEs with nonnegative dictionaries, and rows for which no code passes the threshold."""
    saes = [
        build("stsae", OPTIONS | {"nonnegative": True, "threshold": 1, "l1": 0.3 * n}, 4, seed=n).double()
        for n in range(1, members + 1)
    ]
    return saes, torch.rand(5, 4, dtype=torch.float64)


def _closed_form(sae: StsaeAutoencoder) -> tuple[float, np.ndarray]:
    """λ · mean relu(D), and its gradient: λ / size where D > 0, else 0."""
    entries = sae.decoder.detach().numpy()
    return sae.l1 * np.maximum(entries, 0).mean(), sae.l1 / entries.size * (entries > 0)


def test_the_penalty_of_a_nonnegative_dictionary_is_that_of_its_positive_entries() -> None:
    (sae,), rows = _penalty_alone(1)
    value, gradient = _closed_form(sae)
    loss = sae.loss(rows)
    loss.total.backward()
    assert 0 < (gradient > 0).mean() < 1
    assert sae.l1 * loss.parts["dictionary_l1"].item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(sae.decoder.grad, gradient, rtol=1e-12)


def test_the_penalty_of_nonnegative_dictionaries_in_a_stack() -> None:
    saes, rows = _penalty_alone(3)
    stack = StackedAutoencoder(saes)
    stack.loss(rows).total.sum().backward()
    (gradients,) = (parameter.grad for name, parameter in stack.named_parameters() if name.endswith("decoder"))
    for found, sae in zip(gradients, saes, strict=True):
        np.testing.assert_allclose(found, _closed_form(sae)[1], rtol=1e-12)


def test_gradients_equal_finite_differences_where_the_mask_is_constant() -> None:
    sae, rows = make(threshold=0), torch.from_numpy(np.random.default_rng(1).exponential(size=(3, 4)))
    sae.loss(rows).total.backward()
    for name, parameter in sae.named_parameters():
        place = tuple(size // 2 for size in parameter.shape)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[place] += step
                losses.append(reference(sae, rows.numpy())[2])
                parameter[place] -= step
        expected = (losses[0] - losses[1]) / 2e-6
        assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_masked_codes_get_no_gradient() -> None:
    sae, rows = make(threshold=1.0), torch.rand(5, 4, dtype=torch.float64)
    assert not sae.encode(rows).any()
    sae.loss(rows).total.backward()
    assert not sae.codes.weight.grad.any()


def test_dropout_is_seeded_and_off_in_eval_mode() -> None:
    sae, rows = make(dropout=0.5), torch.rand(5, 4, dtype=torch.float64)
    drawn = []
    sae.train()
    for seed in (1, 1, 2):
        sae.seed_noise(seed)
        drawn.append(sae.loss(rows).total.item())
    assert drawn[0] == drawn[1] != drawn[2]
    sae.eval()
    assert sae.loss(rows).total.item() == pytest.approx(reference(sae, rows.numpy())[2])


def test_dropout_keeps_the_mean_of_what_it_drops() -> None:
    sae = make(dropout=0.3).train()
    sae.seed_noise(0)
    dropped = sae._drop(torch.ones(20_000, 7, dtype=torch.float64))
    assert sorted(set(dropped.flatten().tolist())) == [0.0, pytest.approx(1 / 0.7)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)


def test_widths_follow_the_options() -> None:
    assert build("stsae", {}, channels=16).first.out_features == 2048
    assert build("stsae", {"hidden_per_channel": 4}, channels=16).first.out_features == 64
    assert build("stsae", {"hidden": 8, "expansion": 3}, channels=16).dictionary.shape == (48, 16)


@pytest.mark.parametrize("options", [{"hidden": 8, "hidden_per_channel": 4}, {"dropout": 1.0}, {"threshold": 2}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SaeError, match="stsae"):
        build("stsae", options, channels=8)


def test_auxk_lets_the_strongest_codes_of_dead_modes_explain_the_residual() -> None:
    sae, rows = make(auxk=2, auxk_coefficient=0.7, dead_window=10), np.random.default_rng(0).exponential(size=(6, 4))
    dead = [0, 3, 5]
    sae.samples_since_fired[dead] = 10
    _, reconstruction, loss = reference(sae, rows)
    everything = sae.threshold
    sae.threshold = 0.0
    codes = reference(sae, rows)[0]
    sae.threshold = everything
    rest = (rows - reconstruction) / 3.0
    for row, own in zip(rest, codes, strict=True):
        for mode in sorted(dead, key=lambda mode, own=own: -own[mode])[:2]:
            row -= own[mode] * sae.decoder[mode].detach().numpy()
    found = sae.loss(torch.from_numpy(rows))
    np.testing.assert_allclose(found.parts["auxiliary"], (rest**2).mean(), rtol=1e-12)
    np.testing.assert_allclose(found.total.item(), loss + 0.7 * (rest**2).mean(), rtol=1e-12)
    found.total.backward()
    assert sae.codes.weight.grad[dead].abs().sum(1).gt(0).all(), "codes below the threshold get a gradient"


def test_negative_rows_are_flipped_for_a_nonnegative_dictionary() -> None:
    sae, rows = build("stsae", OPTIONS | {"nonnegative": True}, channels=4), -torch.rand(20, 4)
    sae.calibrate(rows, 0.3)
    assert (sae.scaled(rows) >= 0).all()
    assert (sae.dictionary <= 0).all()
