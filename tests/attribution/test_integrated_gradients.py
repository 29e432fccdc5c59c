"""Integrated gradients of hidden units equal a slow and obvious reimplementation that keeps every step."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import Attributor, IntegratedGradients, TopK, relative_residual
from codec_dist.models import LayerKey

STEPS = 4
Network = tuple[nn.Module, Tensor, list[str]]


def slow_contributions(
    model: nn.Module, image: Tensor, key: LayerKey, target: Callable[[Tensor], Tensor], steps: int
) -> tuple[np.ndarray, float]:
    """Contributions of one layer for one image in float64, shaped like the layer, and T(x) - T(x0)."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        kept.append(hidden.view_as(hidden))
        kept[-1].retain_grad()
        return kept[-1].clone()

    module = model.get_submodule(key.module)
    if key.at_input:
        module.register_forward_pre_hook(lambda module, inputs: (keep(inputs[0]),))
    else:
        module.register_forward_hook(lambda module, inputs, output: keep(output))
    hidden, gradients, values = [], [], []
    for step in range(steps + 1):
        kept.clear()
        point = (step / steps * image.double())[None].requires_grad_()
        value = target(model(point)[0])
        value.backward()
        hidden.append(kept[0].detach().numpy()[0].copy())
        gradients.append(kept[0].grad.numpy()[0].copy())
        values.append(value.item())
    contributions = np.zeros_like(hidden[0])
    for step in range(1, steps + 1):
        contributions += (gradients[step - 1] + gradients[step]) / 2 * (hidden[step] - hidden[step - 1])
    return contributions, values[-1] - values[0]


def slow_reduction(values: np.ndarray, reduction: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Split by sign, then sum positions: one layer, one image."""
    positive, negative = np.where(values > 0, values, 0), np.where(values < 0, values, 0)

    def reduce(part: np.ndarray) -> np.ndarray:
        if part.ndim == 1:
            return part
        if part.ndim == 3:
            return part.sum(axis=(1, 2))
        if reduction == "heads":
            return np.array([part[:, 8 * head : 8 * head + 8].sum() for head in range(4)])
        if reduction == "class_token":
            return part[0]
        if reduction == "patch_tokens":
            return part[1:].sum(axis=0)
        return part.mean(axis=0) if reduction == "mean" else part.sum(axis=0)

    return reduce(positive), reduce(negative)


def relative_distance(found: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / max(np.linalg.norm(expected), 1e-300))


@pytest.mark.parametrize(
    ("target", "slow_target"),
    [(TopK(1), lambda output: output.max()), (TopK(2), lambda output: output.sort().values[-2:].sum())],
    ids=["top-1", "top-2"],
)
def test_equals_the_slow_and_obvious_reimplementation(network: Network, target, slow_target) -> None:
    model, images, layers = network
    method = IntegratedGradients(STEPS, points="uniform")
    exact = Attributor(copy.deepcopy(model).double(), layers, method, target)(images)
    single = Attributor(model, layers, method, target)(images)
    for layer in exact:
        key = LayerKey.parse(layer)
        slow = [slow_contributions(model, image, key, slow_target, STEPS) for image in images]
        reduced = [slow_reduction(contributions, key.reduction) for contributions, _ in slow]
        assert not np.allclose(reduced, 0)
        for sign, name in enumerate(("positive", "negative")):
            expected = np.stack([parts[sign] for parts in reduced])
            np.testing.assert_allclose(getattr(exact[layer], name).numpy(), expected, rtol=1e-10, atol=1e-10)
            assert relative_distance(getattr(single[layer], name), expected) < 1e-5, (layer, name)
        if exact[layer].completeness is not None:
            residual = [contributions.sum() - change for contributions, change in slow]
            np.testing.assert_allclose(exact[layer].completeness.numpy(), residual, atol=1e-10)
    changes = [change for _, change in slow]
    np.testing.assert_allclose((exact.target_value - exact.baseline_value).numpy(), changes, atol=1e-10)


def test_a_frozen_target_keeps_the_outputs_that_are_largest_at_the_image(cnn: tuple[nn.Module, Tensor]) -> None:
    model, images = cnn
    images = 5 * images
    exact = copy.deepcopy(model).double()
    frozen = Attributor(exact, ["blocks.1"], IntegratedGradients(STEPS, points="uniform"), TopK(2, frozen=True))(images)
    chosen = exact.eval()(images.double()).topk(2).indices
    for row, image in enumerate(images):
        contributions, change = slow_contributions(
            model, image, LayerKey("blocks.1"), lambda output, row=row: output[chosen[row]].sum(), STEPS
        )
        np.testing.assert_allclose(frozen["blocks.1"].net[row].numpy(), contributions.sum((1, 2)), atol=1e-10)
        assert frozen.target_value[row] - frozen.baseline_value[row] == pytest.approx(change, abs=1e-10)


def test_another_baseline_shifts_the_path(cnn: tuple[nn.Module, Tensor]) -> None:
    model, images = cnn
    model = model.double().eval()
    baseline = images.mean(0).double()
    result = Attributor(model, ["stem@input"], IntegratedGradients(1, baseline, points="uniform"))(images.double())
    points = torch.stack([images.double(), baseline.expand_as(images)]).requires_grad_()
    value = model(points.flatten(0, 1)).amax(1)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    contributions = gradient.mean(0) * (images - baseline)
    torch.testing.assert_close(result["stem@input"].net, contributions.sum((2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.baseline_value, value[3:].detach(), rtol=0, atol=1e-12)


def test_a_linear_network_is_explained_exactly_by_one_step() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, 2)).double()
    images = torch.randn(4, 3, 2, 2).double()
    result = Attributor(model, ["1"], IntegratedGradients(1), TopK(2))(images)
    expected = (images.flatten(1) @ model[1].weight.T) * model[2].weight.sum(0)
    torch.testing.assert_close(result["1"].net, expected.detach())
    torch.testing.assert_close(result["1"].completeness, torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_completeness_residual_shrinks_as_steps_grow(network: Network) -> None:
    model, images, _ = network
    images = torch.randn(12, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    layer = {"ResidualNetwork": "blocks.1", "Sequential": "1"}.get(type(model).__name__, "blocks.0")
    mean = []
    for steps in (4, 16, 64):
        result = Attributor(model.double(), [layer], IntegratedGradients(steps, points="uniform"))(images)
        change = result.target_value - result.baseline_value
        torch.testing.assert_close(result[layer].net.sum(1), change + result[layer].completeness)
        mean.append(result[layer].completeness.abs().mean().item())
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(mean)), mean
    assert mean[-1] < 0.15 * mean[0], mean


def test_signs_are_split_and_add_up_to_the_net(network: Network) -> None:
    model, images, layers = network
    for layer, result in Attributor(model, layers, activations=True, gradients=True)(images).items():
        for name in ("", "activation_", "gradient_"):
            assert (getattr(result, f"{name}positive") >= 0).all(), layer
            assert (getattr(result, f"{name}negative") <= 0).all(), layer
        assert torch.equal(result.net, result.positive + result.negative)


def test_activations_and_gradients_are_those_at_the_image(network: Network) -> None:
    model, images, layers = network
    model, images = model.double(), images.double()
    # Sums over positions of h and of dT/dh, from a forward pass and finite differences that move h itself.
    for layer, result in Attributor(model, layers, IntegratedGradients(1), activations=True, gradients=True)(
        images
    ).items():
        key = LayerKey.parse(layer)
        hidden, slope = _at_the_image(copy.deepcopy(model).eval(), images, key)
        for found, values in (
            ((result.activation_positive, result.activation_negative), hidden),
            ((result.gradient_positive, result.gradient_negative), slope),
        ):
            expected = [slow_reduction(sample, key.reduction) for sample in values]
            for sign in (0, 1):
                wanted = np.stack([parts[sign] for parts in expected])
                np.testing.assert_allclose(found[sign].numpy(), wanted, atol=1e-10, rtol=1e-10)


def _at_the_image(model: nn.Module, images: Tensor, key: LayerKey) -> tuple[np.ndarray, np.ndarray]:
    """Hidden tensor h and dT/dh, by adding a leaf of zeros to h."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    found: dict[str, Tensor] = {}

    def shift(hidden: Tensor) -> Tensor:
        found["hidden"] = hidden.detach().clone()
        found["shift"] = torch.zeros_like(hidden, requires_grad=True)
        return hidden + found["shift"]

    module = model.get_submodule(key.module)
    if key.at_input:
        module.register_forward_pre_hook(lambda module, inputs: (shift(inputs[0]),))
    else:
        module.register_forward_hook(lambda module, inputs, output: shift(output))
    model(images).amax(1).sum().backward()
    return found["hidden"].numpy(), found["shift"].grad.numpy()


def test_relative_residual_is_guarded_by_the_median_change() -> None:
    target = torch.tensor([10.0, 1.0, 2.0, 0.0])
    baseline = torch.zeros(4)
    residual = torch.tensor([1.0, -0.5, 0.0, 0.003])
    expected = np.abs(residual.numpy()) / np.maximum(target.numpy(), 1e-3 * np.median(target.numpy()))
    np.testing.assert_allclose(relative_residual(residual, target, baseline).numpy(), expected, rtol=1e-6)
    nothing = torch.zeros(2)
    assert relative_residual(nothing, nothing, nothing).tolist() == [0, 0]
