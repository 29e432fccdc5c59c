"""Mode maps against one backward pass per channel and position; few passes; the model left as found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.attribution import AttributionError
from codec_dist.models import ModelError, model_line
from codec_dist.visualization import VisualizationError, mode_maps


class Pass(torch.autograd.Function):
    """Identity that notes every pass through it: forward, backward, and backward of the backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("forward")
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return BackwardPass.apply(gradient, ctx.log), None


class BackwardPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("backward")
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.log.append("backward of backward")
        return gradient.clone(), None


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def forward(self, tensor: Tensor) -> Tensor:
        return Pass.apply(tensor, self.log)


class Network(nn.Module):
    """Convolutions, BatchNorm, in-place ReLU, an in-place shortcut and pooling."""

    def __init__(self, colours: int = 2) -> None:
        super().__init__()
        self.before, self.after = Probe(), Probe()
        self.conv1 = nn.Conv2d(colours, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu1(self.norm1(self.conv1(self.before(images))))
        out = self.norm2(self.conv2(hidden))
        out += hidden
        hidden = self.after(self.relu2(out))
        return self.head(self.pool(hidden).mean(dim=(2, 3)))


def make(colours: int = 2) -> Network:
    torch.manual_seed(0)
    model = Network(colours).double().eval()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


def make_images(count: int = 2, colours: int = 2) -> Tensor:
    return torch.randn(count, colours, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def hidden_at(model: Network, images: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """A hidden tensor and the output, by the forward pass written out without anything in place."""
    hidden = model.norm1(model.conv1(images)).relu()
    found = {"relu1": hidden}
    found["norm2"] = model.norm2(model.conv2(hidden))
    found["relu2"] = (found["norm2"] + hidden).relu()
    return found[layer], model.head(model.pool(found["relu2"]).mean(dim=(2, 3)))


def naive_maps(model: Network, image: Tensor, layer: str, channels: list[int], label: int) -> tuple[Tensor, Tensor]:
    """Positive and negative half for one image, by one backward pass per channel and position."""
    leaf = image[None].clone().requires_grad_()
    hidden, output = hidden_at(model, leaf, layer)
    (slope,) = torch.autograd.grad(output.softmax(dim=1)[0, label], hidden, retain_graph=True)
    halves = [torch.zeros_like(image), torch.zeros_like(image)]
    for channel in channels:
        for row in range(hidden.shape[2]):
            for column in range(hidden.shape[3]):
                unit = hidden[0, channel, row, column]
                (gradient,) = torch.autograd.grad(unit, leaf, retain_graph=True)
                share = (slope[0, channel, row, column] * gradient[0] * image).detach()
                halves[0 if share.sum() > 0 else 1] += share
    return halves[0], halves[1]


@pytest.mark.parametrize("layer", ["relu1", "norm2", "relu2"])
def test_halves_equal_one_backward_pass_per_channel_and_position(layer: str) -> None:
    model, images, labels = make(), make_images(), [2, 0]
    maps = mode_maps(model, layer, images, [3, 1], labels)
    for index, label in enumerate(labels):
        positive, negative = naive_maps(model, images[index], layer, [1, 3], label)
        torch.testing.assert_close(maps.positive[index], positive, rtol=0, atol=1e-12)
        torch.testing.assert_close(maps.negative[index], negative, rtol=0, atol=1e-12)
        torch.testing.assert_close(maps.net[index], positive + negative, rtol=0, atol=1e-12)
        assert positive.abs().max() > 1e-4
        assert negative.abs().max() > 1e-4


def test_each_unit_of_a_half_pulls_its_way() -> None:
    maps = mode_maps(make(), "relu1", make_images(5), [0, 1, 2, 3], 1)
    assert (maps.positive.sum(dim=(1, 2, 3)) > 0).all()
    assert (maps.negative.sum(dim=(1, 2, 3)) <= 0).all()
    torch.testing.assert_close(maps.positive + maps.negative, maps.net)


def test_at_most_five_passes_whatever_the_numbers_of_channels_and_images() -> None:
    model = make()
    # The first map of a layer also finds out, by one forward pass, where its channels are.
    mode_maps(model, "relu1", make_images(1), [0], 1)
    model.before.log.clear()
    model.after.log.clear()
    mode_maps(model, "relu1", make_images(7), [0, 1, 2, 3], 1)
    # Before the layer: forward, two vector-Jacobian products and one Jacobian-vector product.
    assert model.before.log == ["forward", "backward", "backward of backward", "backward"]
    # After it: forward, and backward for the slope of the probability.
    assert model.after.log == ["forward", "backward"]
    assert 1 + model.before.log.count("backward") + model.before.log.count("backward of backward") + 1 <= 5


def test_map_of_all_channels_at_a_cut_is_the_gradient_times_the_image() -> None:
    model, images = make(), make_images(3)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).softmax(dim=1)[:, 2].sum(), leaf)
    maps = mode_maps(model, "relu2", images, range(4), 2)
    torch.testing.assert_close(maps.net, gradient * images)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
def test_maps_of_channels_add_up(channels: list[int]) -> None:
    model, images = make(), make_images()
    together = mode_maps(model, "relu1", images, channels, 0)
    alone = [mode_maps(model, "relu1", images, [channel], 0) for channel in channels]
    for half in ("net", "positive", "negative"):
        torch.testing.assert_close(getattr(together, half), sum(getattr(one, half) for one in alone))


def test_images_do_not_mix() -> None:
    model, images = make(), make_images(3)
    together = mode_maps(model, "relu1", images, [0, 2], [0, 1, 2])
    for index in range(3):
        alone = mode_maps(model, "relu1", images[index : index + 1], [0, 2], index)
        torch.testing.assert_close(together.positive[index], alone.positive[0])


def test_model_in_training_is_explained_in_evaluation_and_left_as_found() -> None:
    model, images = make(), make_images()
    expected = mode_maps(model, "relu1", images, [0], 0)
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        maps = mode_maps(model, "relu1", images.clone(), [0], 0)
    assert torch.equal(maps.net, expected.net)
    assert all(module.training for module in model.modules())
    assert model.relu1.inplace
    assert model.relu2.inplace
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(VisualizationError):
        mode_maps(model, "relu1", images, [9], 0)
    assert model.relu1.inplace
    assert model.training


def test_vision_transformers_have_maps() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).softmax(dim=1)[:, 1].sum(), leaf)
    maps = mode_maps(model, "blocks.0", images, range(12), 1)
    torch.testing.assert_close(maps.net, gradient * images)
    heads = mode_maps(model, "blocks.1.attn.proj@input:heads", images, [0, 2], 1)
    torch.testing.assert_close(heads.positive + heads.negative, heads.net)
    with pytest.raises(VisualizationError, match="it has 3"):
        mode_maps(model, "blocks.1.attn.proj@input:heads", images, [3], 1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"channels": [4]}, VisualizationError, "it has 4"),
        ({"channels": [-1]}, VisualizationError, "numbered from 0"),
        ({"channels": []}, VisualizationError, "channels"),
        ({"classes": 3}, VisualizationError, "the model has 3"),
        ({"classes": [0, 1, 2]}, VisualizationError, "one for each"),
        ({"images": torch.zeros(0, 2, 6, 6)}, VisualizationError, "no images"),
        ({"layer": "relu*"}, VisualizationError, "names 2 layers"),
        ({"layer": "relu3"}, ModelError, "relu2"),
        ({"layer": "relu1:class_token"}, AttributionError, "class_token"),
    ],
)
def test_what_cannot_be_mapped_is_refused(settings: dict, error: type[Exception], message: str) -> None:
    asked = {"layer": "relu1", "images": make_images(), "channels": [0], "classes": 0} | settings
    with pytest.raises(error, match=message):
        mode_maps(make(), **asked)


class Constant(Network):
    """Holds a layer that the image does not reach, and one that the output does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.idle = nn.Linear(1, 3), nn.Conv2d(2, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.idle(images)
        return super().forward(images) + self.bias(images.new_ones(len(images), 1))


@pytest.mark.parametrize(("layer", "message"), [("bias", "does not depend"), ("idle", "does not influence")])
def test_layer_off_the_path_is_refused(layer: str, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(VisualizationError, match=message):
        mode_maps(Constant().double(), layer, make_images(), [0], 0)


class OnceOnly(torch.autograd.Function):
    """Has a gradient, which has none itself."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class OnceDifferentiable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(OnceOnly.apply(images)).mean((2, 3)))


def test_what_a_models_gradients_raise_is_noted_as_the_models() -> None:
    with pytest.raises(RuntimeError) as caught:
        mode_maps(OnceDifferentiable(), "conv", torch.randn(1, 3, 6, 6), [0], 0)
    assert "while gradients of a mode map were computed" in (model_line(caught.value) or "")
