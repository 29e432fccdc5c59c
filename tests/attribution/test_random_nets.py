"""The engine as it comes, in float32, against the plain model in float64: over random small networks, and families."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.attribution import Attributor, IntegratedGradients, Optimizations, Target

PLAIN = Optimizations(inplace=False, fold_batchnorm=False, channels_last=False)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


class Excite(nn.Module):
    """Squeeze-and-excitation: channels scaled by what their means say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.up(self.down(hidden.mean((2, 3), keepdim=True)).sigmoid()).sigmoid()


class Layer(nn.Module):
    """A convolution of some kind, perhaps BatchNorm, an activation, perhaps an excitation and a residual."""

    def __init__(self, before: int, after: int, choice: dict) -> None:
        super().__init__()
        kernel = 1 if choice["kind"] == "1x1" else 3
        groups = {"depthwise": before, "grouped": 2}.get(choice["kind"], 1)
        after = before if choice["kind"] == "depthwise" else after
        self.conv = nn.Conv2d(before, after, kernel, choice["stride"], kernel // 2, groups=groups, bias=choice["bias"])
        self.norm = nn.BatchNorm2d(after) if choice["norm"] else nn.Identity()
        self.act = ACTIVATIONS[choice["act"]]()
        self.excite = Excite(after) if choice["excite"] else nn.Identity()
        self.residual = choice["residual"] and before == after and choice["stride"] == 1
        self.width = after

    def forward(self, hidden: Tensor) -> Tensor:
        made = self.excite(self.norm(self.conv(hidden)))
        if self.residual:
            made += hidden
        return self.act(made)


class RandomNet(nn.Module):
    def __init__(self, choices: list[dict], width: int, ending: str) -> None:
        super().__init__()
        self.layers, before = nn.ModuleList(), width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        for choice in choices:
            self.layers.append(Layer(before, width, choice))
            before = self.layers[-1].width
        self.ending = ending
        self.head = nn.LazyLinear(4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.ending == "pool":
            hidden = hidden.mean((2, 3))
        elif self.ending == "view":
            hidden = hidden.contiguous().view(hidden.size(0), -1)
        elif self.ending == "strict view":
            hidden = hidden.view(hidden.size(0), -1)
        return self.head(hidden.flatten(1))


class SmoothSum(Target):
    """A target without kinks of its own."""

    name = "smooth_sum"

    def value(self, output: Tensor, choice: Tensor | None) -> Tensor:
        return output.tanh().sum(dim=1)


layer_choices = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["3x3", "1x1", "depthwise", "grouped"]),
        "stride": st.integers(1, 2),
        "bias": st.booleans(),
        "norm": st.booleans(),
        "act": st.sampled_from(sorted(ACTIVATIONS)),
        "excite": st.booleans(),
        "residual": st.booleans(),
    }
)


def check(model: nn.Module, images: Tensor, layers: list[str], target: Target | None = None) -> None:
    """The engine as it comes must be as close to float64 as the plain model in float32 is, or to 1e-5.

    Where a network has kinks, a rounding error may turn a unit's gradient on or off, in either.
    """
    method = IntegratedGradients(3, points="uniform")
    exact = Attributor(copy.deepcopy(model).double(), layers, method, target, optimizations=PLAIN)(images.double())
    plain = Attributor(model, layers, method, target, optimizations=PLAIN)(images)
    found = Attributor(model, layers, method, target)(images)
    for layer, values in exact.items():
        wanted = torch.cat([values.positive, values.negative])
        error, unavoidable = (
            float((torch.cat([each[layer].positive, each[layer].negative]).double() - wanted).norm() / wanted.norm())
            for each in (found, plain)
        )
        assert error < 1e-5 + 20 * unavoidable, (layer, error, unavoidable)


def calibrate(model: nn.Module, size: int) -> nn.Module:
    """BatchNorms get the statistics of noise images, so that signals neither vanish nor explode, and random scales."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    choices=st.lists(layer_choices, min_size=1, max_size=3),
    width=st.sampled_from([4, 8, 16]),
    ending=st.sampled_from(["pool", "view", "strict view", "flatten"]),
    batch=st.integers(1, 3),
    size=st.sampled_from([4, 7, 8]),
    chosen=st.sets(st.sampled_from(["", ".conv", ".norm"]), min_size=1),
    seed=st.integers(0, 3),
)
def test_random_networks_agree_with_float64(choices, width, ending, batch, size, chosen, seed) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, images = RandomNet(choices, width, ending), torch.randn(batch, 3, size, size)
        model.eval()(images)  # sizes the head
        calibrate(model, size)
    names = dict(model.named_modules())
    layers = [
        f"layers.{n}{part}" for n in range(len(choices)) for part in sorted(chosen) if f"layers.{n}{part}" in names
    ]
    check(model, images, layers, SmoothSum())


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "efficientnet": (
        lambda: timm.create_model("efficientnet_lite0"),
        ["blocks.0.0.conv_pw", "blocks.5.3", "conv_head"],
    ),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, ["features.1", "features.17.conv.2", "features.18.0"]),
    "mobilenet_v3": (
        lambda: timm.create_model("mobilenetv3_small_050"),
        ["blocks.1.0", "blocks.4.2.conv_pwl", "conv_head"],
    ),
    "repvgg": (lambda: timm.create_model("repvgg_a0"), ["stem", "stages.0.0", "stages.3.0"]),
    "fastvit": (lambda: timm.create_model("fastvit_t8"), ["stem.0", "stages.0.blocks.0", "stages.3"]),
    "resnet18": (torchvision.models.resnet18, ["layer1.0.conv2", "layer2.1", "layer4.1"]),
    "densenet": (lambda: timm.create_model("densenet121"), ["features.denseblock1", "features.norm5"]),
    "shufflenet": (torchvision.models.shufflenet_v2_x0_5, ["stage2.0.branch2.3", "stage4", "conv5.0"]),
    "regnet": (lambda: timm.create_model("regnety_002"), ["s1", "s4.b1.conv3.conv", "s4"]),
    "ghostnet": (lambda: timm.create_model("ghostnet_050"), ["blocks.1.0", "blocks.8"]),
    "convnext": (lambda: timm.create_model("convnext_atto"), ["stages.0.blocks.0", "stages.3.blocks.1"]),
    "mnasnet": (torchvision.models.mnasnet0_5, ["layers.8.0.layers.3", "layers.12", "layers.14"]),
}


QUICK = {"efficientnet", "mobilenet_v2", "repvgg"}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow) for family in FAMILIES]
)
def test_families_agree_with_float64(family: str) -> None:
    build, layers = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = calibrate(build(), 64), torch.randn(1, 3, 64, 64)
    check(model, images, layers)
