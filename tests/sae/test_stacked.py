"""A stack of SAEs is its members: same losses, gradients and trained weights, to float64 rounding."""

import pytest
import torch

from codec_dist.sae import SaeError, StackedAutoencoder, TrainedAutoencoder, build

CHANNELS, MODES = 6, 14
# Options shared by all members, and those of each.
CASES: dict[str, tuple[dict[str, object], list[dict[str, object]]]] = {
    "relu": ({"normalize": False}, [{"l1": 0.1}, {"l1": 0.2}, {"l1": 0.1}]),
    "topk": ({}, [{"k": 2}, {"k": 4}, {"k": 1, "auxk_coefficient": 0.5}]),
    "batchtopk": ({}, [{"k": 3}, {"k": 2}, {"k": 4}]),
    "matryoshka": ({"decoder_bias": "none"}, [{"k": 3}, {"k": 3}, {"k": 3}]),
    "jumprelu": ({"auxk": 3}, [{"l0": 0.1}, {"l0": 0.2, "bandwidth": 0.9}, {"l0": 0.1}]),
    "gated": ({"auxk": 3, "scaling": "per_channel"}, [{"l1": 0.1}, {"l1": 0.2}, {"l1": 0.3}]),
    "stsae": (
        {"hidden": 9, "dropout": 0.3, "auxk": 3, "nonnegative": True, "initial_l0": 4},
        [{"threshold": 0.5}, {"threshold": 0.6, "l1": 0.1}, {"threshold": 0.7}],
    ),
}


def make(name: str) -> tuple[list[TrainedAutoencoder], torch.Tensor]:
    shared, own = CASES[name]
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(len(own), 40, CHANNELS, generator=generator, dtype=torch.float64)
    saes = []
    for number, options in enumerate(own):
        sae = build(name, {"modes": MODES, "dead_window": 16, **shared, **options}, CHANNELS, seed=number).double()
        assert isinstance(sae, TrainedAutoencoder)
        sae.calibrate(rows[number], 0.2 + 0.1 * number)
        sae.samples_since_fired[: number + 1] = 100
        saes.append(sae.train())
    return saes, rows


def step(
    sae: TrainedAutoencoder | StackedAutoencoder, optimizer: torch.optim.Optimizer, rows: torch.Tensor
) -> torch.Tensor:
    optimizer.zero_grad()
    loss = sae.loss(rows).total
    loss.sum().backward()
    sae.before_step()
    optimizer.step()
    sae.after_step()
    return loss.detach()


@pytest.mark.parametrize("name", CASES)
def test_training_a_stack_is_training_its_members(name: str) -> None:
    saes, rows = make(name)
    stack = StackedAutoencoder(saes)
    apart = [torch.optim.Adam(sae.parameters(), lr=0.01) for sae in saes]
    together = torch.optim.Adam(stack.parameters(), lr=0.01)
    auxiliary = 0
    for number in range(12):
        batch = rows[:, 8 * (number % 5) :][:, :8]
        if number == 0:
            for seed, sae in enumerate(saes):
                sae.seed_noise(seed)
            stack.seed_noise(range(len(saes)))
        auxiliary += "auxiliary" in stack.loss(rows[:, :0]).parts
        expected = [step(sae, one, batch[k]) for k, (sae, one) in enumerate(zip(saes, apart, strict=True))]
        torch.testing.assert_close(step(stack, together, batch), torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert auxiliary or name == "relu"
    for found, expected in zip(stack.unstack(), saes, strict=True):
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-8, atol=1e-10)
        assert (found.options, found.scale) == (expected.options, expected.scale)


@pytest.mark.parametrize("name", CASES)
def test_loadings_reconstructions_and_gradients_are_those_of_the_members(name: str) -> None:
    saes, rows = make(name)
    stack = StackedAutoencoder(saes).eval()
    loadings = stack.encode(rows)
    gradients = torch.autograd.grad(stack.loss(rows).total.sum(), list(stack.parameters()), allow_unused=True)
    for k, sae in enumerate(saes):
        sae.eval()
        torch.testing.assert_close(loadings[k], sae.encode(rows[k]), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(stack(rows)[k], sae(rows[k]), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(stack.dictionary[k], sae.dictionary, rtol=0, atol=0)
        own = torch.autograd.grad(sae.loss(rows[k]).total, list(sae.parameters()), allow_unused=True)
        for found, expected in zip(gradients, own, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-12)


def test_rows_may_be_the_same_for_all_members() -> None:
    saes, rows = make("topk")
    stack = StackedAutoencoder(saes)
    same = rows[0].expand(len(saes), -1, -1)
    torch.testing.assert_close(stack.loss(rows[0]).total, stack.loss(same).total, rtol=0, atol=0)


def test_resampling_a_stack_is_resampling_its_members() -> None:
    saes, rows = make("topk")
    stack = StackedAutoencoder(saes)
    found = stack.resample(rows, seeds=[5, 6, 7])
    for k, sae in enumerate(saes):
        assert torch.equal(sae.resample(rows[k], seed=5 + k), found[k])
        assert found[k].sum() == k + 1
    for member, sae in zip(stack.unstack(), saes, strict=True):
        torch.testing.assert_close(member.state_dict(), sae.state_dict(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["topk", "stsae"])
def test_flat_vectors_are_divided_as_members_order_their_parameters(name: str) -> None:
    saes, _ = make(name)
    stack = StackedAutoencoder(saes)
    flat = torch.cat([parameter.detach().flatten() for parameter in stack.parameters()])
    members = stack.split(flat)
    for sae, member in zip(saes, members, strict=True):
        assert torch.equal(member, torch.cat([parameter.detach().flatten() for parameter in sae.parameters()]))
    assert torch.equal(stack.join(members), flat)


def test_a_stack_leaves_its_members_alone() -> None:
    saes, rows = make("relu")
    before = [parameter.clone() for parameter in saes[0].parameters()]
    stack = StackedAutoencoder(saes)
    step(stack, torch.optim.SGD(stack.parameters(), lr=0.1), rows)
    assert all(torch.equal(old, new) for old, new in zip(before, saes[0].parameters(), strict=True))


def test_members_that_are_unlike_are_refused() -> None:
    topk = [build("topk", {"modes": 8, "k": 2}, 4), build("topk", {"modes": 8, "k": 3}, 4)]
    StackedAutoencoder(topk)
    with pytest.raises(SaeError, match="differ in modes"):
        StackedAutoencoder([topk[0], build("topk", {"modes": 9, "k": 2}, 4)])
    with pytest.raises(SaeError, match="found topk of 4 channels and relu of 4"):
        StackedAutoencoder([topk[0], build("relu", {"modes": 8}, 4)])
    with pytest.raises(SaeError, match="at least one"):
        StackedAutoencoder([])
