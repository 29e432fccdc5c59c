"""What the remedies for dead modes, and BatchTopK's threshold, promise."""

import math

import pytest
import torch

from codec_dist.sae import BatchTopKAutoencoder, TrainedAutoencoder, build, forget_moments

CHANNELS = 16
LEARNED = {
    "relu": {"l1": 0.02},
    "topk": {"k": 2, "auxk": 0},
    "batchtopk": {"k": 2, "auxk": 0},
    "matryoshka": {"k": 2, "auxk": 0},
    "jumprelu": {},
    "gated": {"l1": 0.02},
    "stsae": {"hidden": 32, "threshold": 0.8, "initial_l0": 2},
}


def mixtures(rows: int, atoms: int = 12, seed: int = 5) -> torch.Tensor:
    """Rows that are sums of two atoms."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, CHANNELS, generator=generator), dim=1)
    on = torch.rand(rows, atoms, generator=generator).argsort(1) < 2
    return (on * (0.5 + torch.rand(rows, atoms, generator=generator))) @ dictionary


def make(name: str, **options: object) -> tuple[TrainedAutoencoder, torch.Tensor]:
    rows = mixtures(1024)
    sae = build(name, {"modes": 12, "dead_window": 500, **LEARNED[name], **options}, CHANNELS, seed=2)
    assert isinstance(sae, TrainedAutoencoder)
    sae.calibrate(rows, rows.std().item())
    return sae.train(), rows


def train(sae: TrainedAutoencoder, rows: torch.Tensor, steps: int, rate: float = 5e-3) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(sae.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        sae.loss(rows[torch.randint(len(rows), (128,), generator=generator)]).total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
    return optimizer


@torch.no_grad()
def kill(sae: TrainedAutoencoder, modes: int) -> None:
    """Make the first modes silent for every row."""
    if sae.architecture == "stsae":
        sae.codes.weight[:modes] = 0
    else:
        sae.encoder_bias[:modes] = -4


def fires(sae: TrainedAutoencoder, rows: torch.Tensor) -> torch.Tensor:
    sae.eval()
    fired = (sae.encode(rows) > 0).any(0)
    sae.train()
    return fired


@pytest.mark.parametrize(
    ("name", "auxk"),
    [("relu", 6), ("relu", 0), ("jumprelu", 6), ("gated", 6), ("batchtopk", 6), ("stsae", 6), ("stsae", 0)],
)
def test_auxk_revives_dead_modes(name: str, auxk: int) -> None:
    sae, rows = make(name, auxk=auxk, auxk_coefficient=1 if name == "stsae" else 1 / 32)
    kill(sae, 4)
    assert not fires(sae, rows)[:4].any()
    train(sae, rows, 600, rate=1e-2)
    revived = fires(sae, rows)[:4].sum()
    assert revived >= 2 if auxk else revived == 0


@pytest.mark.parametrize("name", LEARNED)
def test_resampled_modes_fire_and_lower_the_error_of_the_rows_they_were_given(name: str) -> None:
    sae, rows = make(name)
    train(sae, rows, 100)
    kill(sae, 4)
    sae.samples_since_fired[:4] = 500
    sae.samples_since_fired[4:] = 0
    before, loss = sae.state_dict(), sae.eval().loss(rows).parts["reconstruction"].item()
    before = {label: value.clone() for label, value in before.items()}
    resampled = sae.resample(rows, seed=1)
    assert resampled.tolist() == [True] * 4 + [False] * 8
    assert fires(sae, rows)[:4].all()
    for label in sae.mode_parameters:
        assert torch.equal(sae.state_dict()[label][4:], before[label][4:]), "living modes are left alone"
    for label in set(before) - {*sae.mode_parameters, "samples_since_fired"}:
        assert torch.equal(sae.state_dict()[label], before[label])
    assert not sae.dead.any()
    train(sae, rows, 200, rate=1e-3)
    assert sae.eval().loss(rows).parts["reconstruction"].item() < loss


def test_resampling_prefers_badly_reconstructed_rows() -> None:
    sae, rows = make("topk", modes=200, k=1)
    with torch.no_grad():
        rows[:10] = 20 * torch.eye(CHANNELS)[:10]  # ten rows with nearly all of the squared error
        sae.encoder_bias.fill_(-1e6)  # nothing fires, so residuals are rows
    sae.samples_since_fired[:10] = 500
    sae.resample(rows, seed=0)
    cosine = sae.dictionary[:10] @ torch.eye(CHANNELS)[:10].T
    assert (cosine.amax(1) > 0.8).sum() >= 8
    # Each row once, while there are enough.
    assert len(set(cosine.argmax(1).tolist())) >= 8


def test_resampling_is_a_function_of_the_seed() -> None:
    dictionaries = []
    for seed in (1, 1, 2):
        sae, rows = make("topk")
        sae.samples_since_fired[:4] = 500
        sae.resample(rows, seed)
        dictionaries.append(sae.dictionary)
    assert torch.equal(dictionaries[0], dictionaries[1])
    assert not torch.equal(dictionaries[0], dictionaries[2])


@pytest.mark.parametrize("name", ["topk", "gated", "stsae"])
def test_moments_of_resampled_modes_are_forgotten(name: str) -> None:
    sae, rows = make(name)
    optimizer = train(sae, rows, 5)
    modes = torch.zeros(12, dtype=torch.bool)
    modes[:3] = True
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = {label: optimizer.state[parameter][moment] for label, parameter in sae.named_parameters()}
        before = {label: value.clone() for label, value in moments.items()}
        forget_moments(sae, modes, moments)
        for label, value in moments.items():
            if label in sae.mode_parameters:
                assert not value[:3].any()
                assert torch.equal(value[3:], before[label][3:])
            else:
                assert torch.equal(value, before[label])


@pytest.mark.parametrize(("fired", "threshold"), [(3, 0.9), (5.5, 0.8), (0.25, 0.5)])
def test_stsae_starts_with_the_chosen_number_of_modes_per_row(fired: float, threshold: float) -> None:
    rows = mixtures(2000)
    sae = build("stsae", {"modes": 48, "hidden": 64, "initial_l0": fired, "threshold": threshold}, CHANNELS)
    sae.calibrate(rows, rows.std().item())
    on = sae.eval().encode(rows) > 0
    assert on.sum(1).double().mean().item() == pytest.approx(fired, rel=0.01)
    assert (on.sum(0) - fired * len(rows) / 48).abs().max() <= 2, "the modes share the rows evenly"


def test_stsae_of_the_paper_starts_nearly_silent() -> None:
    rows = mixtures(2000)
    sae = build("stsae", {"modes": 48, "hidden": 64}, CHANNELS)
    sae.calibrate(rows, rows.std().item())
    assert (sae.eval().encode(rows) > 0).double().mean() < 1e-3


def test_the_threshold_of_batchtopk_is_the_fading_mean_of_smallest_survivors() -> None:
    sae, rows = make("batchtopk", threshold_memory=4)
    assert isinstance(sae, BatchTopKAutoencoder)
    assert sae.threshold == 0
    smallest, weights = [], []
    for batch in rows[:600].split(100):
        loadings = sae.encode(batch)
        smallest.append(loadings[loadings > 0].min().item())
        weights = [0.75 * weight for weight in weights] + [0.25]
        sae.loss(batch)
        sae.after_step()
        expected = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-5)


def test_batchtopk_keeps_k_per_row_on_average_in_training_and_by_its_threshold() -> None:
    sae, rows = make("batchtopk", k=3)
    train(sae, rows, 400)
    found, unseen = sae.encode(rows), mixtures(4000)
    assert (found > 0).sum() == 3 * len(rows)
    assert (found > 0).sum(1).unique().numel() > 1, "some rows get more than others"
    sae.eval()
    assert (sae.encode(unseen) > 0).sum(1).double().mean().item() == pytest.approx(3, abs=0.3)
    one_by_one = torch.cat([sae.encode(row[None]) for row in unseen[:20]])
    torch.testing.assert_close(one_by_one, sae.encode(unseen[:20])), "rows do not depend on each other"


def test_a_batch_without_positive_preactivations_leaves_the_threshold_alone() -> None:
    sae, rows = make("batchtopk")
    assert isinstance(sae, BatchTopKAutoencoder)
    train(sae, rows, 3)
    before = sae.threshold.item()
    with torch.no_grad():
        sae.encoder_bias.fill_(-100)
    sae.loss(rows)
    sae.after_step()
    assert sae.threshold.item() == before
    assert math.isfinite(sae.loss(rows).total.item())
