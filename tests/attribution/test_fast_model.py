"""A model is made faster only where nobody can notice, and is itself again afterwards."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small
from torchvision.models.resnet import Bottleneck, ResNet

from codec_dist.attribution import Attributor, Capture, IntegratedGradients, edited
from codec_dist.attribution.fast_model import find_foldable, prepared
from codec_dist.models import LayerKey, resolve_layers

Pair = tuple[nn.Module, Tensor]


def foldable(model: nn.Module, images: Tensor, layers: list[str]) -> dict[str, str]:
    with Capture(model, resolve_layers(model, layers)) as capture:
        return {norm: linear for linear, norm in find_foldable(capture, images[:1])}


@pytest.fixture
def resnet() -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=8)
        return model, torch.randn(2, 3, 32, 32)


def test_every_batch_norm_of_a_resnet_goes_into_the_convolution_before_it(resnet: Pair) -> None:
    model, images = resnet
    pairs = foldable(model, images, ["blocks"])
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert set(pairs) == norms
    assert pairs["layer1.0.bn2"] == "layer1.0.conv2"
    assert pairs["layer2.0.downsample.1"] == "layer2.0.downsample.0"


@pytest.mark.parametrize("layer", ["layer1.0.conv2", "layer1.0.bn2@input"])
def test_a_chosen_layer_between_the_two_keeps_them_apart(resnet: Pair, layer: str) -> None:
    pairs = foldable(*resnet, ["blocks", layer])
    assert "layer1.0.bn2" not in pairs
    assert "layer1.0.bn1" in pairs


def test_the_output_of_a_folded_norm_can_be_chosen(resnet: Pair) -> None:
    model, images = resnet
    assert "layer1.0.bn2" in foldable(model, images, ["layer1.0.bn2"])
    model, images = model.double(), images.double()
    plain = Attributor(model, ["layer1.0.bn2"], fold_batchnorm=False)(images)["layer1.0.bn2"]
    folded = Attributor(model, ["layer1.0.bn2"])(images)["layer1.0.bn2"]
    torch.testing.assert_close(folded.positive, plain.positive, rtol=1e-9, atol=1e-12)


def test_a_layer_that_someone_watches_is_not_folded(resnet: Pair) -> None:
    model, images = resnet
    seen: list[Tensor] = []
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    model.layer1[0].bn3.register_forward_pre_hook(lambda module, inputs: None)
    pairs = foldable(model, images, ["blocks"])
    assert {"layer1.0.bn1", "layer1.0.bn3"}.isdisjoint(pairs)
    expected = model.eval()(images)
    before = seen[-1]
    Attributor(model, ["blocks"], IntegratedGradients(1))(images)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(seen[-1], before, rtol=0, atol=0)


class Shared(nn.Module):
    """A convolution whose output two take; one that is called twice; a linear layer before tokens are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again, self.norm_again = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.plain, self.norm_plain = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.tokens, self.norm_tokens = nn.Linear(6, 5), nn.BatchNorm1d(36)
        self.linear, self.norm_linear, self.head = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        hidden = self.norm(hidden) + hidden
        hidden = self.norm_again(self.again(self.again(hidden)))
        hidden = self.norm_plain(self.plain(hidden)).flatten(2).transpose(1, 2)
        hidden = self.norm_tokens(self.tokens(hidden)).mean(1)
        return self.head(self.norm_linear(self.linear(hidden)))


def test_only_pairs_that_belong_to_each_other_alone_are_folded() -> None:
    assert foldable(Shared().eval(), torch.randn(1, 3, 8, 8), ["head@input"]) == {
        "norm_plain": "plain",
        "norm_linear": "linear",
    }


def test_the_folded_model_gives_the_same_output_and_is_itself_again(resnet: Pair) -> None:
    model, images = resnet
    model = model.eval()
    images = images.double()
    model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    expected, own = model(images), dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    with Capture(model, resolve_layers(model, ["blocks"])) as capture:
        pairs = find_foldable(capture, images[:1])
        with prepared(model, pairs, channels_last=True):
            folded = model(images)
            assert model.conv1.weight is not own["conv1.weight"]
            assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(folded, expected, rtol=1e-10, atol=1e-10)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(images), expected)


def test_weights_that_change_between_calls_are_those_explained(resnet: Pair) -> None:
    model, images = resnet
    model, images = model.double(), images.double()
    attributor = Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"))
    attributor(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.layer1[0].bn2.running_var.mul_(3)
    fresh = Attributor(
        copy.deepcopy(model), ["blocks"], IntegratedGradients(2, points="uniform"), fold_batchnorm=False
    )(images)
    for layer, found in attributor(images).items():
        torch.testing.assert_close(found.positive, fresh[layer].positive, rtol=1e-8, atol=1e-11)


def test_an_edit_between_a_folded_pair_sees_what_it_would_see_without(resnet: Pair) -> None:
    model, images = resnet
    model, images = model.double().eval(), images.double()
    attributor = Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"))
    attributor(images)
    edits = {LayerKey("layer2.0.conv1"): lambda hidden: hidden * (hidden > 0.1)}
    with edited(model, edits):
        plain = Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"), fold_batchnorm=False)(images)
        for layer, found in attributor(images).items():
            torch.testing.assert_close(found.positive, plain[layer].positive, rtol=1e-8, atol=1e-11)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(input=self.norm(input=self.conv(input=images)).mean((2, 3)))


def test_layers_called_by_keyword_are_left_alone() -> None:
    model, images = ByKeyword().eval(), torch.randn(2, 3, 8, 8)
    assert foldable(model, images, ["conv"]) == {}
    assert Attributor(model, ["conv"])(images)["conv"].positive.shape == (2, 4)


class Scale(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.float() * 0.5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.linear, self.scale, self.out = nn.Flatten(), nn.Linear(12, 12), Scale(), nn.Identity()
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        flat = self.flat(images)
        return self.head(self.out(flat + self.scale(self.linear(flat))))


def test_a_gradient_that_autograd_hands_to_two_layers_is_unscaled_once() -> None:
    model, images = Residual(), torch.randn(2, 3, 2, 2)
    wide = Attributor(model, ["scale", "out"], IntegratedGradients(2, points="uniform"))(images)
    narrow = Attributor(model, ["scale", "out"], IntegratedGradients(2, points="uniform"), autocast="float16")(images)
    for layer in wide:
        torch.testing.assert_close(narrow[layer].net, wide[layer].net, rtol=0.02, atol=0.01)


def test_an_error_amid_the_faster_form_leaves_the_model_as_it_was(resnet: Pair) -> None:
    model, images = resnet
    attributor = Attributor(model, ["blocks"])
    attributor.probe(images)
    own = dict(model.named_parameters())
    model.fc.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attributor(images)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())


def test_depthwise_convolutions_and_hard_swishes_fold_too() -> None:
    torch.manual_seed(1)
    model = mobilenet_v3_small(num_classes=4).double().eval()
    images = torch.randn(1, 3, 32, 32).double()
    assert len(foldable(model, images, ["blocks"])) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_narrow_types_stay_within_percents_of_float32(resnet: Pair, kind: str) -> None:
    model, images = resnet
    method = IntegratedGradients(4, points="uniform")
    wide = Attributor(model, ["blocks", "fc@input"], method, fold_batchnorm=False)(images)
    narrow = Attributor(model, ["blocks", "fc@input"], method, autocast=kind)(images)
    for layer in wide:
        assert narrow[layer].positive.dtype == torch.float32
        error = (narrow[layer].net - wide[layer].net).norm() / wide[layer].net.norm()
        assert error < 0.25, (layer, error)
    torch.testing.assert_close(narrow.target_value, wide.target_value, rtol=0.05, atol=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
