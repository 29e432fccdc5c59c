"""The step that all SAEs take together, against torch.optim.Adam on one SAE at a time."""

import pytest
import torch

from codec_dist.sae import TrainedAutoencoder, build, forget_moments
from codec_dist.training.collectives import Ranks
from codec_dist.training.optimizer import Lockstep

OPTIONS = {
    "topk": {"modes": 10, "k": 1, "dead_window": 12},
    "stsae": {"hidden": 6, "threshold": 0.5, "dropout": 0, "l1": 0.1},
}
RATES = (0.02, 0.005, 0.02)


def make(seed: int, name: str, channels: int) -> tuple[TrainedAutoencoder, torch.Tensor]:
    sae = build(name, OPTIONS[name], channels, seed=seed).double()
    assert isinstance(sae, TrainedAutoencoder)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(64, channels, generator=generator, dtype=torch.float64)
    sae.calibrate(rows, rows.std().item())
    return sae, rows


def three() -> list[tuple[TrainedAutoencoder, torch.Tensor]]:
    return [make(1, "topk", 5), make(2, "stsae", 7), make(3, "topk", 4)]


def batches(steps: int) -> list[torch.Tensor]:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return [order[(16 * step) % 64 :][: 16 if step % 4 else 9] for step in range(steps)]


def test_lockstep_equals_separate_adam_optimizers() -> None:
    together, apart = three(), three()
    lockstep = Lockstep([sae for sae, _ in together], [0.02] * 3, Ranks())
    lockstep.set_rates([rate / 0.02 for rate in RATES])
    optimizers = [torch.optim.Adam(sae.parameters(), lr=rate) for (sae, _), rate in zip(apart, RATES, strict=True)]
    losses, auxiliary = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches(20):
        lockstep.step([rows[batch] for _, rows in together], len(batch))
        for number, ((sae, rows), optimizer) in enumerate(zip(apart, optimizers, strict=True)):
            optimizer.zero_grad()
            loss, parts = sae.loss(rows[batch])
            auxiliary += "auxiliary" in parts
            loss.backward()
            sae.before_step()
            optimizer.step()
            sae.after_step()
            losses[number] += loss.detach() * len(batch)
    assert auxiliary > 5  # so that AuxK took part
    for (found, _), (expected, _) in zip(together, apart, strict=True):
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-11)
    rows_seen = sum(map(len, batches(20)))
    found_losses, rows = lockstep.pop_losses()
    assert found_losses == pytest.approx(losses.tolist())
    assert rows == rows_seen
    assert lockstep.pop_losses() == ([0, 0, 0], 0)


def test_a_restored_state_continues_bit_by_bit() -> None:
    whole, first, second = three(), three(), three()
    straight = Lockstep([sae for sae, _ in whole], [0.01] * 3, Ranks())
    for batch in batches(12):
        straight.step([rows[batch] for _, rows in whole], len(batch))
    before = Lockstep([sae for sae, _ in first], [0.01] * 3, Ranks())
    for batch in batches(12)[:5]:
        before.step([rows[batch] for _, rows in first], len(batch))
    for (source, _), (target, _) in zip(first, second, strict=True):
        target.load_state_dict(source.state_dict())
    after = Lockstep([sae for sae, _ in second], [0.01] * 3, Ranks())
    after.load_states(before.states())
    for batch in batches(12)[5:]:
        after.step([rows[batch] for _, rows in second], len(batch))
    for (found, _), (expected, _) in zip(second, whole, strict=True):
        assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_gradients_are_clipped_sae_by_sae_and_stacks_keep_rates_and_clips_apart() -> None:
    rates, clips = [0.02, 0.005, 0.01], [0.05, None, 0.2]
    saes = [make(seed, "topk", 5) for seed in (1, 2, 3)]
    apart = [make(seed, "topk", 5)[0] for seed in (1, 2, 3)]
    lockstep = Lockstep([sae for sae, _ in saes], rates, Ranks(), stacks=[[0, 1, 2]], clips=clips)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=rate) for sae, rate in zip(apart, rates, strict=True)]
    clipped = 0
    for batch in batches(15):
        lockstep.step([saes[0][1][batch]], len(batch))
        for sae, optimizer, clip in zip(apart, optimizers, clips, strict=True):
            optimizer.zero_grad()
            sae.loss(saes[0][1][batch]).total.backward()
            sae.before_step()
            if clip is not None:
                clipped += torch.nn.utils.clip_grad_norm_(sae.parameters(), clip).item() > clip
            optimizer.step()
            sae.after_step()
    assert clipped > 5
    for found, expected in zip(lockstep.saes(), apart, strict=True):
        # torch's clipping divides by the norm plus 1e-6.
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_resampled_modes_forget_their_moments() -> None:
    (sae, rows), (other, _) = make(1, "topk", 5), make(1, "topk", 5)
    lockstep, optimizer = Lockstep([sae], [0.02], Ranks()), torch.optim.Adam(other.parameters(), lr=0.02)
    for number, batch in enumerate(batches(12)):
        lockstep.step([rows[batch]], len(batch))
        optimizer.zero_grad()
        other.loss(rows[batch]).total.backward()
        other.before_step()
        optimizer.step()
        other.after_step()
        if number == 7:
            lockstep.resample(lockstep.units[0], rows, [3])
            dead = other.resample(rows, seed=3)
            assert dead.any()
            for kind in ("exp_avg", "exp_avg_sq"):
                moments = {name: optimizer.state[value][kind] for name, value in other.named_parameters()}
                forget_moments(other, dead, moments)
    torch.testing.assert_close(sae.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)
