"""What makes a model faster is used only where the model's outputs, hidden values and gradients stay what they are."""

import copy
import logging
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec_dist.attribution import AttributionError, Attributor, IntegratedGradients, Optimizations, capture, fast_model
from codec_dist.attribution.self_check import fastest_agreeing

PLAIN = Optimizations(inplace=False, fold_batchnorm=False, channels_last=False)


def norm_error(model: nn.Module, images: Tensor, layers: list[str], steps: int = 3) -> float:
    """The default engine's float32 contributions against the plain float64 model: worst relative norm of a layer."""
    exact = copy.deepcopy(model).double()
    expected = Attributor(exact, layers, IntegratedGradients(steps, points="uniform"), optimizations=PLAIN)(
        images.double()
    )
    found = Attributor(model, layers, IntegratedGradients(steps, points="uniform"))(images)
    errors = []
    for layer, values in expected.items():
        wanted = torch.cat([values.positive, values.negative])
        got = torch.cat([found[layer].positive, found[layer].negative]).double()
        errors.append(float((got - wanted).norm() / wanted.norm()))
    return max(errors)


def alone(model: nn.Module, size: int = 16) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(1, 3, size, size)


def conv_norm_relu() -> nn.Module:
    """The chosen convolution keeps its BatchNorm from being folded."""
    torch.manual_seed(2)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def pointwise() -> nn.Module:
    """A 1×1 convolution of the image itself beside a 3×3 one, as in the blocks of RepVGG."""
    torch.manual_seed(3)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.relu(self.wide(images) + self.narrow(images))

    return nn.Sequential(Block(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


CASES = [
    pytest.param(conv_norm_relu, ["0", "3"], id="convolution before an unfolded BatchNorm"),
    pytest.param(pointwise, ["0", "1"], id="1x1 convolutions"),
]


@pytest.mark.parametrize(("build", "layers"), CASES)
@pytest.mark.parametrize("images", [1, 3])
def test_a_batch_of_one_in_channels_last_gets_the_gradients_of_the_plain_model(build, layers, images: int) -> None:
    batch = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    assert norm_error(build(), batch, layers) < 1e-5


def degenerate_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what keeps strides, so that torch computes wrong gradients for a batch of one in channels_last."""
    monkeypatch.setattr(capture, "same_strides", lambda tensor: tensor.view_as(tensor))
    monkeypatch.setattr(
        fast_model, "laid_out", lambda tensor, memory_format: tensor.contiguous(memory_format=memory_format)
    )


@pytest.mark.parametrize(
    ("name", "layers"),
    [("repvgg_a0", ["stem", "stages.0.0"]), ("mobilenetv2_050", ["blocks.6.0.conv_pwl", "conv_head"])],
)
def test_where_torch_gives_wrong_gradients_the_engine_still_gives_right_ones(name, layers, monkeypatch) -> None:
    degenerate_strides(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5).eval()
    images = alone(model, 64)
    exact = Attributor(
        copy.deepcopy(model).double(), layers, IntegratedGradients(3, points="uniform"), optimizations=PLAIN
    )(images.double())
    unchecked = Attributor(model, layers, IntegratedGradients(3, points="uniform"), optimizations=Optimizations())(
        images
    )
    attributor = Attributor(model, layers, IntegratedGradients(3, points="uniform"))
    checked = attributor(images)

    def error(found) -> float:
        return max(float((found[layer].net - exact[layer].net).norm() / exact[layer].net.norm()) for layer in exact)

    # Whether torch is wrong depends on the processor.
    assert attributor.optimizations.channels_last == (error(unchecked) < 1e-3)
    assert error(checked) < 1e-4


class WrongAlone(torch.autograd.Function):
    """Doubles gradients of a batch of one in channels_last."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.wrong = len(output) == 1 and output.is_contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient if ctx.wrong else gradient


class WrongInChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = WrongAlone.apply(self.conv(images).relu())
        return self.head(self.next(hidden).relu().mean((2, 3)))


def test_wrong_gradients_of_a_batch_of_one_alone_are_found_and_said_once(caplog) -> None:
    torch.manual_seed(0)
    model, images = WrongInChannelsLast().eval(), torch.randn(3, 3, 12, 12)
    attributor = Attributor(model, ["conv", "next"])
    with caplog.at_level(logging.WARNING):
        attributor.probe(images)
        attributor(images)
    assert attributor.optimizations == Optimizations(channels_last=False)
    assert "gradients at layer conv" in attributor.left_out["channels_last"]
    assert sum("channels_last" in record.getMessage() for record in caplog.records) == 1
    assert norm_error(model, images, ["conv", "next"]) < 1e-5


class Viewed(nn.Module):
    """LeNet's way to flatten, which tensors in channels_last do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 196, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.conv(images)))
        return self.head(hidden.view(hidden.size(0), -1))


def test_a_model_that_fails_in_channels_last_is_explained_without() -> None:
    torch.manual_seed(0)
    model = Viewed().eval()
    attributor = Attributor(model, ["norm"])
    attributor.probe(torch.randn(2, 3, 16, 16))
    assert attributor.optimizations == Optimizations(channels_last=False)
    assert norm_error(model, torch.randn(3, 3, 16, 16), ["norm"]) < 1e-5


class Contiguous(nn.Module):
    """Insists on one layout of memory."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.conv, self.head, self.error = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), error

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        if not hidden.is_contiguous():
            raise self.error("the features must be contiguous")
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize("error", [AssertionError, ValueError, TypeError, NotImplementedError])
def test_whatever_a_model_raises_in_channels_last_it_is_explained_without(error: type[Exception]) -> None:
    torch.manual_seed(0)
    model, images = Contiguous(error).eval(), torch.randn(2, 3, 8, 8)
    attributor = Attributor(model, ["conv"])
    attributor.probe(images)
    assert attributor.optimizations == Optimizations(channels_last=False)
    assert error.__name__ in attributor.left_out["channels_last"]
    assert norm_error(model, images, ["conv"]) < 1e-5


class Reused(nn.Module):
    """Takes a convolution's weights a second time, past its module: folding changes what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)
        nn.init.constant_(self.norm.running_var, 4.0)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images))
        return self.head(F.conv2d(hidden, self.conv.weight).mean((2, 3)))


def test_folding_that_changes_results_is_switched_off_alone() -> None:
    torch.manual_seed(0)
    model = Reused().eval()
    attributor = Attributor(model, ["norm"])
    attributor.probe(torch.randn(1, 3, 16, 16))
    assert attributor.optimizations == Optimizations(fold_batchnorm=False)
    assert norm_error(model, torch.randn(2, 3, 16, 16), ["norm"]) < 1e-5


@pytest.mark.parametrize("probability", [0.5, 0.002])
def test_a_network_that_is_random_in_evaluation_mode_is_refused_or_allowed(probability: float) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(48, 64), nn.Linear(64, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(F.dropout(self.first(images.flatten(1)).relu(), probability))

    torch.manual_seed(0)
    model, images = Random().eval(), torch.randn(3, 3, 4, 4)
    with pytest.raises(AttributionError, match=r"random in evaluation mode.*allow_random"):
        Attributor(model, ["first"])(images)
    allowed = Attributor(model, ["first"], allow_random=True)
    assert allowed(images)["first"].positive.shape == (3, 64)
    assert allowed.optimizations == Optimizations(False, False, False, False)


def test_a_network_that_draws_numbers_without_using_them_is_not_random() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(48, 5)

        def forward(self, images: Tensor) -> Tensor:
            torch.rand(3)
            return self.first(images.flatten(1)).relu()

    attributor = Attributor(Draws().eval(), ["first"])
    attributor.probe(torch.ones(1, 3, 4, 4))
    assert attributor.optimizations == Optimizations()


class Mixing(nn.Module):
    """Subtracts a part of the mean over the batch."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.first, self.head, self.part = nn.Linear(48, 16), nn.Linear(16, 3), part

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        return self.head(hidden - self.part * hidden.mean(0))


@pytest.mark.parametrize("part", [1.0, 0.01])
@pytest.mark.parametrize("count", [1, 2])
def test_a_network_that_mixes_the_images_of_a_batch_is_refused(part: float, count: int) -> None:
    torch.manual_seed(0)
    with pytest.raises(AttributionError, match=r"mixes the images of a batch.*outputs.*allow_mixing"):
        Attributor(Mixing(part).eval(), ["first"])(torch.randn(count, 3, 4, 4))


class Ordered(nn.Module):
    """Each image is changed by those before it only, so that the first one never is; perhaps without a gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(48, 16), nn.Linear(16, 3)
        self.recurrent = nn.GRU(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        if self.kind == "recurrent over the batch":
            hidden = self.recurrent(hidden[:, None])[0][:, 0]
        elif self.kind == "sums over the batch":
            hidden = hidden.cumsum(0)
        elif self.kind == "less the first":
            hidden = hidden + hidden - hidden[:1]
        elif self.kind == "less the first, without a gradient":
            hidden = hidden + hidden - hidden[:1].detach()
        return self.head(hidden)


@pytest.mark.parametrize(
    "kind",
    ["recurrent over the batch", "sums over the batch", "less the first", "less the first, without a gradient"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_network_in_which_an_image_depends_on_its_place_in_the_batch_is_refused(kind: str, count: int) -> None:
    torch.manual_seed(0)
    model, images = Ordered(kind).eval(), torch.randn(count, 3, 4, 4)
    with pytest.raises(AttributionError, match=r"mixes the images of a batch.*allow_mixing"):
        Attributor(model, ["first"])(images)
    allowed = Attributor(model, ["first"], allow_mixing=True)
    allowed.probe(images)
    assert allowed.optimizations == Optimizations()


def test_a_mixing_network_that_is_allowed_gets_whole_batches() -> None:
    torch.manual_seed(0)
    model, images = Mixing(0.5).double().eval(), torch.randn(4, 3, 4, 4).double()
    found = Attributor(model, ["first"], IntegratedGradients(4, points="uniform"), allow_mixing=True)(images)
    points, values = [], []
    for step in range(5):
        hidden = model.first((images * step / 4).flatten(1)).detach().requires_grad_()
        acts = hidden.relu()
        top = model.head(acts - 0.5 * acts.mean(0)).amax(1)
        points.append((hidden.detach(), torch.autograd.grad(top.sum(), hidden)[0]))
        values.append(top.detach())
    expected = sum(0.5 * (g0 + g1) * (h1 - h0) for (h0, g0), (h1, g1) in pairwise(points))
    torch.testing.assert_close(found["first"].net, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.baseline_value, values[0], rtol=1e-10, atol=1e-12)


def test_known_optimizations_are_taken_as_they_are(cnn) -> None:
    model, images = cnn
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    Attributor(model, ["blocks"], optimizations=Optimizations()).probe(images)
    known = sum(sizes)
    sizes.clear()
    checked = Attributor(model, ["blocks"])
    checked.probe(images)
    assert checked.optimizations == Optimizations()
    # Plain twice, fast together and alone: no more than two forward passes and two backward passes of two images.
    assert sum(sizes) - known <= 7


def test_all_that_agrees_is_kept_and_the_rest_named() -> None:
    def disagreement(tried: Optimizations) -> str | None:
        return "wrong" if tried.channels_last and tried.inplace else None

    kept, left_out = fastest_agreeing(Optimizations(), disagreement)
    assert kept == Optimizations(channels_last=False)
    assert left_out == {"channels_last": "wrong"}
    with pytest.raises(AttributionError, match="always wrong"):
        fastest_agreeing(Optimizations(), lambda tried: "always wrong")


def test_a_kink_is_not_taken_for_an_error() -> None:
    """Hidden units at zero to rounding: another order of summation turns their gradient on or off."""
    torch.manual_seed(1)
    first = nn.Conv2d(3, 64, 3, bias=False)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.randn(1, 3, 3, 3)
    with torch.no_grad():
        flat = first.weight.flatten(1).double()
        patch = images.flatten(1).double()
        # Weights orthogonal to the image: what is left of the product is rounding alone.
        flat -= (flat @ patch.T) * patch / (patch @ patch.T)
        first.weight.copy_(flat.reshape(first.weight.shape))
    attributor = Attributor(model, ["0"])
    attributor.probe(images)
    assert attributor.optimizations == Optimizations()
