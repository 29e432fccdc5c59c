"""Each architecture with a linear encoder against an obvious reimplementation, row by row and mode by mode."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from codec_dist.sae import LinearAutoencoder, SaeError, StackedAutoencoder, build, topk

CHANNELS, MODES, ROWS, SCALE = 5, 12, 9, 2.0
OPTIONS: dict[str, dict[str, object]] = {
    "relu": {"l1": 0.3},
    "topk": {"k": 3, "auxk": 0},
    "batchtopk": {"k": 2, "auxk": 0},
    "matryoshka": {"k": 3, "auxk": 0, "prefixes": [0.25, 0.5, 1]},
    "jumprelu": {"l0": 0.2, "initial_threshold": 0.4, "bandwidth": 0.7},
    "gated": {"l1": 0.3},
}
VARIANTS: list[dict[str, object]] = [{}, {"normalize": False}, {"decoder_bias": "none"}]


def make(name: str, **options: object) -> tuple[LinearAutoencoder, torch.Tensor]:
    """A float64 SAE with untied, trained-looking weights, and rows in stored units."""
    sae = build(name, {"modes": MODES, **OPTIONS[name], **options}, CHANNELS, seed=1).double()
    assert isinstance(sae, LinearAutoencoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sae.scale = SCALE
    return sae, 3 * torch.rand(ROWS, CHANNELS, generator=generator, dtype=torch.float64)


def reconstruct(sae: LinearAutoencoder, loadings: list[torch.Tensor], modes: int = MODES) -> torch.Tensor:
    bias = 0 if sae.decoder_bias is None else sae.decoder_bias
    return sum((loadings[m] * sae.decoder[m] for m in range(modes)), torch.zeros(CHANNELS).double() + bias)


def preactivation(sae: LinearAutoencoder, row: torch.Tensor) -> list[torch.Tensor]:
    centred = row if sae.decoder_bias is None else row - sae.decoder_bias
    return [centred @ sae.encoder[m] + sae.encoder_bias[m] for m in range(MODES)]


def size(sae: LinearAutoencoder, mode: int) -> torch.Tensor:
    return torch.ones(()) if sae.options["normalize"] else sae.decoder[mode].norm()


def of_relu(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    loadings = [[torch.clamp(a, min=0) for a in preactivation(sae, row)] for row in rows]
    l1 = sum(z[m] * size(sae, m) for z in loadings for m in range(MODES)) / len(rows) / CHANNELS**0.5
    return loadings, squares(sae, rows, loadings) + 0.3 * l1


def of_topk(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    loadings = []
    for row in rows:
        a = preactivation(sae, row)
        strongest = sorted(range(MODES), key=lambda m, a=a: -a[m].item())[:3]
        loadings.append([a[m].clamp(min=0) if m in strongest else torch.zeros(()) for m in range(MODES)])
    return loadings, squares(sae, rows, loadings)


def of_batch(sae: LinearAutoencoder, rows: list[torch.Tensor], k: int) -> list[list[torch.Tensor]]:
    a = [preactivation(sae, row) for row in rows]
    places = [(i, m) for i in range(len(rows)) for m in range(MODES)]
    strongest = set(sorted(places, key=lambda place: -a[place[0]][place[1]].item())[: k * len(rows)])
    return [
        [a[i][m].clamp(min=0) if (i, m) in strongest else torch.zeros(()) for m in range(MODES)]
        for i in range(len(rows))
    ]


def of_batchtopk(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    loadings = of_batch(sae, rows, 2)
    return loadings, squares(sae, rows, loadings)


def of_matryoshka(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    loadings = of_batch(sae, rows, 3)
    return loadings, sum(squares(sae, rows, loadings, modes) for modes in (3, 6, 12)) / 3


def of_jumprelu(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    threshold = sae.state_dict()["log_threshold"].exp()
    a = [preactivation(sae, row) for row in rows]
    loadings = [[a[i][m] if a[i][m] > threshold[m] else 0 * a[i][m] for m in range(MODES)] for i in range(len(rows))]
    return loadings, squares(sae, rows, loadings) + 0.2 * sum(int(z > 0) for row in loadings for z in row) / len(rows)


def of_gated(sae: LinearAutoencoder, rows: list[torch.Tensor]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    loadings, gates = [], []
    for row in rows:
        gate = preactivation(sae, row)
        magnitude = [
            sae.log_gain[m].exp() * (gate[m] - sae.encoder_bias[m]) + sae.magnitude_bias[m] for m in range(MODES)
        ]
        loadings.append([magnitude[m].clamp(min=0) * (gate[m] > 0) for m in range(MODES)])
        gates.append([one.clamp(min=0) for one in gate])
    l1 = sum(gate[m] * size(sae, m) for gate in gates for m in range(MODES)) / len(rows) / CHANNELS**0.5
    bias = 0 if sae.decoder_bias is None else sae.decoder_bias.detach()
    by_gates = [sum((gate[m] * sae.decoder[m].detach() for m in range(MODES)), bias) for gate in gates]
    auxiliary = torch.stack([row - one for row, one in zip(rows, by_gates, strict=True)]).square().mean()
    return loadings, squares(sae, rows, loadings) + 0.3 * l1 + auxiliary


REFERENCES: dict[str, Callable[..., tuple[list[list[torch.Tensor]], torch.Tensor]]] = {
    "relu": of_relu,
    "topk": of_topk,
    "batchtopk": of_batchtopk,
    "matryoshka": of_matryoshka,
    "jumprelu": of_jumprelu,
    "gated": of_gated,
}


def squares(
    sae: LinearAutoencoder, rows: list[torch.Tensor], loadings: list[list[torch.Tensor]], modes: int = MODES
) -> torch.Tensor:
    errors = [row - reconstruct(sae, z, modes) for row, z in zip(rows, loadings, strict=True)]
    return torch.stack(errors).square().mean()


def table(loadings: list[list[torch.Tensor]]) -> np.ndarray:
    return np.array([[z.item() for z in row] for row in loadings])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loadings_loss_and_gradients_equal_the_definition(name: str, variant: dict[str, object]) -> None:
    sae, rows = make(name, **variant)
    sae.train()
    expected_loadings, expected_loss = REFERENCES[name](sae, list(rows / SCALE))
    assert 0 < (table(expected_loadings) > 0).mean() < 0.9
    found = sae.encode(rows)
    np.testing.assert_allclose(found.detach(), table(expected_loadings), rtol=1e-11, atol=1e-13)
    stored = [SCALE * reconstruct(sae, z).detach() for z in expected_loadings]
    torch.testing.assert_close(sae.decode(found).detach(), torch.stack(stored))
    loss = sae.loss(rows).total
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    expected = torch.autograd.grad(expected_loss, parameters, allow_unused=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, gradient, reference in zip(names, gradients, expected, strict=True):
        if one != "log_threshold":  # has a pseudo-derivative, see below
            torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-13, msg=lambda m, n=one: f"{n}: {m}")


def test_thresholds_of_jumprelu_get_the_pseudo_derivatives_of_the_paper() -> None:
    sae, rows = make("jumprelu")
    sae.loss(rows).total.backward()
    with torch.no_grad():
        threshold, width = sae.log_threshold.exp(), 0.7
        expected, inside = torch.zeros(MODES).double(), 0
        for row in rows / SCALE:
            a = preactivation(sae, row)
            error = reconstruct(sae, [one if one > threshold[m] else 0 * one for m, one in enumerate(a)]) - row
            for m in range(MODES):
                if abs((a[m] - threshold[m]) / width) < 0.5:
                    inside += 1
                    by_loading = 2 * (error @ sae.decoder[m]) / (ROWS * CHANNELS)
                    expected[m] += by_loading * -threshold[m] / width + 0.2 / ROWS * -1 / width
        assert inside > 5
        torch.testing.assert_close(sae.log_threshold.grad, expected * threshold, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["relu", "gated"])
def test_gradients_equal_finite_differences(name: str) -> None:
    sae, rows = make(name, normalize=False)
    sae.loss(rows).total.backward()
    for label, parameter in sae.named_parameters():
        # The last term of the gated loss takes these as constants: differences would see them move.
        if name == "gated" and label in ("decoder", "decoder_bias"):
            continue
        for place in (tuple(0 for _ in parameter.shape), tuple(size // 2 for size in parameter.shape)):
            losses = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[place] += step
                    losses.append(sae.loss(rows).total.item())
                    parameter[place] -= step
            expected = (losses[0] - losses[1]) / 2e-6
            assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), label


@pytest.mark.parametrize("name", OPTIONS)
def test_a_share_without_rows_has_no_loss_and_no_gradient(name: str) -> None:
    sae, rows = make(name)
    loss = sae.loss(rows[:0], batch_rows=4).total
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in sae.parameters())
    assert not sae.statistics.any()


def test_a_share_without_rows_has_no_gradient_in_sparse_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "SPARSE_ELEMENTS", 1)
    monkeypatch.setattr(topk, "SPARSE", 1)
    alone = [build("topk", {"modes": MODES, "k": 2}, CHANNELS, seed=seed) for seed in (1, 2)]
    for sae in (alone[0], StackedAutoencoder(alone)):
        sae.train()
        loss = sae.loss(torch.rand(0, CHANNELS), batch_rows=4).total.sum()
        loss.backward()
        assert loss.item() == 0
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in sae.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_held_out_losses_do_not_depend_on_which_modes_are_declared_dead(name: str) -> None:
    sae, rows = make(name, auxk=4)
    sae.eval()
    before = sae.loss(rows).total.item()
    sae.samples_since_fired += sae.settings.dead_window
    assert sae.loss(rows).total.item() == before


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("batchtopk", "matryoshka")])
def test_losses_of_two_halves_average_to_the_loss_of_the_whole(name: str) -> None:
    sae, rows = make(name)
    halves = [sae.loss(part).total * len(part) for part in (rows[:4], rows[4:])]
    torch.testing.assert_close(sum(halves) / ROWS, sae.loss(rows).total)


@pytest.mark.parametrize("name", OPTIONS)
def test_nonnegative_dictionaries_stay_so_with_unit_rows(name: str) -> None:
    sae = build(name, {"modes": MODES, **OPTIONS[name], "nonnegative": True}, CHANNELS, seed=1)
    rows = -torch.rand(64, CHANNELS)
    sae.calibrate(rows, rows.std().item())
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        sae.loss(rows).total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
    assert (sae.atoms() >= 0).all()
    assert (sae.dictionary <= 0).all(), "rows are ≤ 0, and the dictionary is in their units"
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(MODES))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relu", {"l1": -1}, "l1 must not be negative"),
        ("relu", {"scaling": "both"}, "scaling"),
        ("relu", {"decoder_bias": "median"}, "decoder_bias"),
        ("relu", {"modes": True}, "modes"),
        ("relu", {"expansion": 0}, "expansion"),
        ("topk", {"auxk": -1}, "auxk"),
        ("topk", {"resample_every": 0}, "resample_every"),
        ("batchtopk", {"threshold_memory": 0}, "threshold_memory"),
        ("jumprelu", {"initial_threshold": 0}, "initial_threshold"),
        ("jumprelu", {"bandwidth": 0}, "bandwidth"),
        ("gated", {"l1": "much"}, "l1"),
        ("matryoshka", {"prefixes": [0.5, 0.25, 1]}, "prefixes must rise"),
        ("matryoshka", {"prefixes": [0.5]}, "prefixes must rise"),
        ("matryoshka", {"prefixes": ["half", 1]}, "prefixes"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(SaeError, match=message):
        build(name, options, channels=8)
