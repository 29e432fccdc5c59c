"""ablate, preserve, scale and add, against tensors changed by hand; the model is left as found."""

import copy
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import AttributionError
from codec_dist.interventions import InterventionError, ablate, add, preserve, scale
from codec_dist.models import ModelError


class Attention(nn.Module):
    """Attention over tokens whose output projection has a name that presets know."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.values = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.values(tokens) * tokens.mean(dim=1, keepdim=True))


class Small(nn.Module):
    """Convolutions with in-place ReLU, then tokens with attention, then an MLP on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.attention = Attention(6, 3)
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.with_class_token(self.relu(self.conv(images)).flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens)
        return self.fc2(self.fc1(tokens.mean(dim=1)).tanh())

    def with_class_token(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model: Small, images: Tensor, place: str, change) -> Tensor:
    """The forward pass written out, with ``change`` applied to the hidden tensor at ``place``."""

    def at(name: str, tensor: Tensor) -> Tensor:
        return change(tensor.clone()) if name == place else tensor

    hidden = at("relu", at("conv", model.conv(images)).relu())
    tokens = model.with_class_token(hidden.flatten(2).transpose(1, 2))
    attention = model.attention
    inner = at("attention.proj@input", attention.values(tokens) * tokens.mean(dim=1, keepdim=True))
    tokens = tokens + at("attention", attention.proj(inner))
    neurons = at("fc2@input", at("fc1", model.fc1(tokens.mean(dim=1))).tanh())
    return model.fc2(neurons)


def zero(*index) -> object:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = 0
        return tensor

    return change


ALL = slice(None)
CASES = {
    "channels of a convolution": ("conv", [1, 4], zero(ALL, [1, 4])),
    "output of an in-place module": ("relu", [0], zero(ALL, [0])),
    "dimensions of tokens": ("attention", [2, 5], zero(ALL, ALL, [2, 5])),
    "units of an MLP": ("fc1", [3], zero(ALL, [3])),
    "input of a linear layer": ("fc2@input", [0, 3], zero(ALL, [0, 3])),
    "attention heads": ("attention.proj@input:heads", [1], zero(ALL, ALL, [2, 3])),
    "the class token alone": ("attention:class_token", [4], zero(ALL, 0, 4)),
    "patch tokens": ("attention:patch_tokens", [4], zero(ALL, slice(1, None), 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_ablate_sets_the_channels_to_zero_at_the_covered_positions(case: str, model: Small, images: Tensor) -> None:
    layer, channels, change = CASES[case]
    expected = by_hand(model, images, layer.partition(":")[0], change)
    untouched = model(images)
    with ablate(model, layer, channels):
        changed = model(images)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(changed, untouched)
    assert torch.equal(model(images), untouched)


def test_preserve_sets_all_others_to_zero(model: Small, images: Tensor) -> None:
    with preserve(model, "conv", [0, 2]):
        changed = model(images)
    torch.testing.assert_close(changed, by_hand(model, images, "conv", zero(ALL, [1, 3, 4, 5])))
    with preserve(model, "attention.proj@input:heads", torch.tensor([0])):
        changed = model(images)
    torch.testing.assert_close(changed, by_hand(model, images, "attention.proj@input", zero(ALL, ALL, [2, 3, 4, 5])))


def test_scale_multiplies_the_channels(model: Small, images: Tensor) -> None:
    factors = torch.tensor([1.0, -2.5, 1, 1, 1, -2.5], dtype=torch.float64)
    with scale(model, "conv", [1, 5], -2.5):
        changed = model(images)
    torch.testing.assert_close(changed, by_hand(model, images, "conv", lambda h: h * factors[:, None, None]))


def test_add_steers_along_a_vector(model: Small, images: Tensor) -> None:
    vector = torch.randn(6, dtype=torch.float64)
    with add(model, "conv", vector):
        changed = model(images)
    torch.testing.assert_close(changed, by_hand(model, images, "conv", lambda h: h + vector[:, None, None]))
    heads = torch.tensor([1.0, 0, -3], dtype=torch.float64)
    with add(model, "attention.proj@input:heads", heads):
        changed = model(images)
    expected = by_hand(model, images, "attention.proj@input", lambda h: h + heads.repeat_interleave(2))
    torch.testing.assert_close(changed, expected)


def test_contexts_nest_also_on_one_layer(model: Small, images: Tensor) -> None:
    with ExitStack() as stack:
        for context in (ablate(model, "conv", [1]), ablate(model, "conv", [4]), ablate(model, "fc1", [2])):
            stack.enter_context(context)
        changed = model(images)
    with ablate(model, "conv", [1, 4]), ablate(model, "fc1", [2]):
        torch.testing.assert_close(changed, model(images))


def test_contexts_serve_inference_and_gradients_and_other_sizes(model: Small, images: Tensor) -> None:
    with ablate(model, "conv", [0]):
        with torch.inference_mode():
            quick = model(images)
        leaf = images.clone().requires_grad_()
        output = model(leaf)
        output.sum().backward()
        assert model(images[:, :, :2]).shape == (3, 4)
    assert torch.equal(quick, output)
    assert leaf.grad is not None


def state(model: nn.Module) -> tuple:
    flags = [(m.training, getattr(m, "inplace", None)) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return flags, hooks, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("context", [ablate, preserve, lambda m, layer, c: scale(m, layer, c, 2.0)])
def test_model_is_as_found_also_after_an_error(context, model: Small, images: Tensor) -> None:
    model.train()
    before, weights = state(model), copy.deepcopy(model.state_dict())

    def fail_inside() -> None:
        with context(model, "conv", [1]):
            assert state(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    with pytest.raises(InterventionError), context(model, "conv", [6]):
        model(images)
    assert state(model) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_exist_is_refused(model: Small, images: Tensor) -> None:
    def attempt(context: AbstractContextManager) -> None:
        with context:
            model(images)

    with pytest.raises(InterventionError, match="channel 6 of conv does not exist: it has 6"):
        attempt(ablate(model, "conv", [1, 6]))
    with pytest.raises(InterventionError, match="channel -1"):
        attempt(ablate(model, "conv", [-1]))
    with pytest.raises(InterventionError, match="channel 3 of attention"):
        attempt(preserve(model, "attention.proj@input:heads", [3]))
    with pytest.raises(InterventionError, match="vector of 5"):
        attempt(add(model, "conv", torch.zeros(5)))
    with pytest.raises(InterventionError, match="names 2 layers"):
        attempt(ablate(model, "fc*", [0]))
    with pytest.raises(ModelError, match="conv"):
        attempt(ablate(model, "convv", [0]))
    with pytest.raises(AttributionError, match="heads"):
        attempt(ablate(model, "conv:heads", [0]))
