"""Hidden tensors are watched and changed, and the model stays exactly as it was found."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import (
    AttributionError,
    Attributor,
    Capture,
    IntegratedGradients,
    TrueLabel,
    borrowed,
    edited,
)
from codec_dist.models import LayerKey

CNN = tuple[nn.Module, Tensor]


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that a visitor could leave changed."""
    state: list[Any] = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    state += [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        hooks = {key: list(value) for key, value in vars(module).items() if "hooks" in key and value is not None}
        state.append((name, plain, hooks))
    return state


def assert_same(before: list[Any], after: list[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        if isinstance(one[1], Tensor):
            assert torch.equal(one[1], other[1]), one[0]
        else:
            assert one == other


@pytest.fixture
def peculiar(cnn: CNN) -> CNN:
    """A model in a state that is easy to lose: mixed modes, mixed flags, a hook of its owner's."""
    model, images = cnn
    model.train()
    model.blocks[1].eval()
    model.stem.weight.requires_grad_(False)
    model.blocks[0].act1.inplace = False
    model.head.register_forward_hook(lambda module, inputs, output: None)
    model.act = model.blocks[2].act1
    model.blocks[2].act2 = model.act
    return model, images


def test_attribution_leaves_the_model_as_it_was(peculiar: CNN) -> None:
    model, images = peculiar
    before = state_of(model)
    Attributor(model, ["blocks", "norm"], activations=True)(images)
    assert_same(before, state_of(model))


def _wrong_channels(model: nn.Module, images: Tensor) -> None:
    Attributor(model, ["blocks"])(images[:, :2])


def _no_labels(model: nn.Module, images: Tensor) -> None:
    Attributor(model, ["blocks"], target=TrueLabel())(images)


def _called_twice(model: nn.Module, images: Tensor) -> None:
    Attributor(model, ["blocks", "act"])(images)


def _unknown_module(model: nn.Module, images: Tensor) -> None:
    with Capture(model, [LayerKey("blocks.0"), LayerKey("nowhere")]):
        pass


@pytest.mark.parametrize("fail", [_wrong_channels, _no_labels, _called_twice, _unknown_module])
def test_an_error_leaves_the_model_as_it_was(peculiar: CNN, fail: Callable[[nn.Module, Tensor], None]) -> None:
    model, images = peculiar
    before = state_of(model)
    with pytest.raises((AttributionError, RuntimeError)):
        fail(model, images)
    assert_same(before, state_of(model))


def test_borrowed_models_are_frozen_in_evaluation_mode_without_in_place_modules(peculiar: CNN) -> None:
    model, _ = peculiar
    before = state_of(model)
    with borrowed(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert_same(before, state_of(model))


def test_captured_tensors_are_not_overwritten(cnn: CNN) -> None:
    model, images = cnn
    keys = [LayerKey("norm"), LayerKey("blocks.1.bn2"), LayerKey("blocks.1.bn1")]
    expected: dict[str, Tensor] = {}
    reference = copy.deepcopy(model).eval()
    for key in keys:  # copied at once, before in-place operations reach it
        reference.get_submodule(key.module).register_forward_hook(
            lambda module, inputs, output, name=key.module: expected.update({name: output.clone()})
        )
    output = reference(images)
    with Capture(model, keys) as capture:
        for _ in range(3):  # the first pass learns what is overwritten downstream
            captured = capture(images)
            torch.testing.assert_close(captured.output, output)
            for key in keys:
                torch.testing.assert_close(captured.hidden[key], expected[key.module])


def test_a_capture_is_not_used_within_itself(cnn: CNN) -> None:
    model, _ = cnn
    before = state_of(model)
    with Capture(model, [LayerKey("stem")]) as capture, pytest.raises(RuntimeError, match="open already"):
        capture.__enter__()
    assert_same(before, state_of(model))


def test_captured_tensors_come_in_the_order_of_the_pass(cnn: CNN) -> None:
    model, images = cnn
    keys = [LayerKey("blocks.2"), LayerKey("head", at_input=True), LayerKey("stem")]
    with Capture(model, keys) as capture, torch.no_grad():
        captured = capture(images)
    assert [str(key) for key in captured.hidden] == ["stem", "blocks.2", "head@input"]
    assert not any(tensor.requires_grad for tensor in captured.hidden.values())


def test_gradients_of_an_identity_follow_its_own_path_only() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.shortcut = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.first(images)
            return 3 * hidden + self.shortcut(hidden)

    model, images = Twin(), torch.randn(2, 4)
    shortcut, first = LayerKey("shortcut"), LayerKey("first")
    for keys in ([first, shortcut], [shortcut]):
        with Capture(model, keys) as capture:
            output, hidden = capture(images)
            gradients = torch.autograd.grad(output.sum(), [hidden[key] for key in keys])
        assert torch.equal(gradients[-1], torch.ones(2, 4))
        if len(keys) == 2:
            assert torch.equal(gradients[0], torch.full((2, 4), 4.0))


def test_gradients_reach_images_that_ask_for_them(cnn: CNN) -> None:
    model, images = cnn
    images.requires_grad_()
    with Capture(model, [LayerKey("blocks.0")]) as capture:
        hidden = capture(images).hidden[LayerKey("blocks.0")]
        (gradient,) = torch.autograd.grad(hidden.sum(), images)
    assert gradient.abs().sum() > 0


class RefusesBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        raise AssertionError("the backward pass went below the earliest layer")


def test_backward_stops_at_the_earliest_layer(cnn: CNN) -> None:
    model, images = cnn
    with edited(model, {LayerKey("stem"): RefusesBackward.apply}):
        Attributor(model, ["blocks.0", "blocks.2"])(images)
        with pytest.raises(AssertionError, match="below the earliest layer"):
            Attributor(model, ["stem@input"])(images)


def test_edits_take_the_place_of_hidden_tensors(cnn: CNN) -> None:
    model, images = cnn
    model.eval()
    clean = model(images)
    with edited(model, {LayerKey("blocks.1"): torch.zeros_like}):
        changed = model(images)
    with edited(model, {LayerKey("head", at_input=True): lambda hidden: torch.zeros_like(hidden)}):
        bias_only = model(images)
    assert not torch.allclose(changed, clean)
    torch.testing.assert_close(bias_only, model.head.bias.expand(3, -1))
    assert torch.equal(model(images), clean)


def test_an_edit_may_repeat_the_batch_for_many_conditions(cnn: CNN) -> None:
    model, images = cnn
    model.eval()
    masks = torch.stack([torch.ones(12), torch.zeros(12), (torch.arange(12) < 4).float()])[:, None, :, None, None]
    with torch.no_grad():
        with edited(model, {LayerKey("blocks.1"): lambda hidden: (hidden * masks).flatten(0, 1)}):
            together = model(images).unflatten(0, (3, 3))
        for mask, output in zip(masks, together, strict=True):
            with edited(model, {LayerKey("blocks.1"): lambda hidden, mask=mask: hidden * mask}):
                torch.testing.assert_close(output, model(images))


class Odd(nn.Module):
    """Modules whose outputs have every form that a hidden tensor may come in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = nn.GRU(4, 4, batch_first=True)
        self.named = Named()
        self.unused = nn.Linear(4, 4)
        self.twice = nn.ReLU()
        self.counts = Counts()
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.twice(self.first(images))[:, None]
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = hidden + self.recurrent(hidden)[0] + self.named(hidden)["hidden"]
        return self.head(self.twice(hidden[:, 0])) + self.counts(hidden)


class Named(nn.Module):
    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        return {"hidden": hidden}


class Counts(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.sum((1, 2)) > 0).long()[:, None]


def test_a_tuple_with_one_tensor_is_a_hidden_tensor() -> None:
    torch.manual_seed(0)
    result = Attributor(Odd(), ["attention"])(torch.randn(2, 4))
    assert result["attention"].positive.shape == (2, 4)


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        ("recurrent", "layer recurrent: its module returns a tuple with 2 tensors"),
        ("attention@input", "layer attention@input: its module takes a tuple with 3 tensors"),
        ("named", "layer named: its module returns a dict, not a tensor"),
        ("unused", "layer unused was not reached"),
        ("twice", "layer twice is called more than once"),
        ("counts", r"layer counts holds torch\.int64"),
    ],
)
def test_what_cannot_be_captured_is_named_with_the_cause(layer: str, cause: str) -> None:
    with pytest.raises(AttributionError, match=cause) as caught:
        Attributor(Odd(), [layer], IntegratedGradients(2, points="uniform"))(torch.randn(2, 4))
    assert "\n" not in str(caught.value)
