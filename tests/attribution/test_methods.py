"""The other methods equal their formulas, with gradients taken by hand."""

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import METHODS, ActivationGradient, AttributionError, Attributor, OutputSum, SmoothGradient


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 6).double()


def hidden_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden tensor h of the first layer and dT/dh for T = sum of outputs, in closed form."""
    hidden = images @ model[0].weight.T + model[0].bias
    return hidden.detach(), ((1 - hidden.tanh() ** 2) * model[2].weight.sum(0)).detach()


def normalised(values: Tensor) -> Tensor:
    return values / (values**2).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("normalize", "formula"),
    [
        ("neither", lambda h, g: h * g),
        ("gradient", lambda h, g: h * normalised(g)),
        ("both", lambda h, g: normalised(h) * normalised(g)),
    ],
)
def test_activation_times_gradient(normalize: str, formula) -> None:
    model, images = network()
    result = Attributor(model, ["0"], ActivationGradient(normalize), OutputSum())(images)["0"]
    expected = formula(*hidden_and_gradient(model, images))
    torch.testing.assert_close(result.positive, expected.clamp(min=0))
    torch.testing.assert_close(result.negative, expected.clamp(max=0))


def test_the_norm_is_over_all_positions_and_zero_stays_zero() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 2)).double()
    images = torch.randn(2, 1, 2, 2).double()
    images[1] = 0
    result = Attributor(model, ["0"], ActivationGradient("both"), OutputSum())(images)["0"].net
    hidden = (images * model[0].weight.view(1, 2, 1, 1)).flatten(1)
    expected = normalised(hidden[:1]) * normalised(model[2].weight.sum(0)[None])
    torch.testing.assert_close(result[:1], expected.detach().view(1, 2, 4).sum(2))
    assert torch.equal(result[1], torch.zeros(2).double())


def test_smooth_gradient_without_noise_is_activation_times_gradient() -> None:
    model, images = network()
    smooth = Attributor(model, ["0"], SmoothGradient(3, sigma=0.0), OutputSum())(images)["0"].net
    hidden, gradient = hidden_and_gradient(model, images)
    torch.testing.assert_close(smooth, hidden * gradient)


def test_smooth_gradient_is_the_mean_over_gaussian_noise() -> None:
    model, images = network()
    sigma = 0.4
    found = Attributor(model, ["0"], SmoothGradient(600, sigma), OutputSum())(images[:1])["0"].net
    noisy = images[:1] + sigma * torch.randn(200_000, 6, generator=torch.Generator().manual_seed(1)).double()
    products = torch.mul(*hidden_and_gradient(model, noisy))
    standard_error = products.std(0) / 600**0.5
    assert ((found[0] - products.mean(0)).abs() < 5 * standard_error).all()
    other = Attributor(model, ["0"], SmoothGradient(600, sigma, seed=1), OutputSum())(images[:1])["0"].net
    assert not torch.equal(found, other)


def test_smooth_gradient_does_not_depend_on_batches() -> None:
    model, images = network()
    together = Attributor(model, ["0"], SmoothGradient(5))(images)["0"].net
    apart = Attributor(model, ["0"], SmoothGradient(5), microbatch=1)(images)["0"].net
    torch.testing.assert_close(together, apart)


def test_the_config_reaches_every_method_by_name() -> None:
    assert set(METHODS) == {"integrated_gradients", "activation_gradient", "smooth_gradient"}
    assert METHODS.build("integrated_gradients", {"steps": 3}).name == "integrated_gradients_3"
    assert METHODS.build("activation_gradient", {"normalize": "both"}).name == "activation_gradient_normalized_both"
    assert METHODS.build("smooth_gradient").name == "smooth_gradient_20"
    for name, options, cause in (
        ("integrated_gradients", {"steps": 0}, "steps is 0"),
        ("integrated_gradients", {"step": 3}, "did you mean steps"),
        ("activation_gradient", {"normalize": "all"}, "normalize is 'all'"),
        ("smooth_gradient", {"samples": 0}, "samples is 0"),
    ):
        with pytest.raises(AttributionError, match=cause):
            METHODS.build(name, options)
