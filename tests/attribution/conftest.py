"""Small networks that hold what makes attribution hard, with random weights, and images for them."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """BatchNorm, an in-place ReLU, and an addition that overwrites the last BatchNorm's output."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.act1 = nn.ReLU(inplace=True)
        self.act2 = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if stride > 1 or before != after else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(images)))))
        out += self.shortcut(images)
        return self.act2(out)


class ResidualNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([ResidualBlock(8, 8, 1), ResidualBlock(8, 12, 2), ResidualBlock(12, 12, 1)])
        self.head = nn.Linear(12, 6)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((2, 3)))


def _randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.3 * torch.randn(module.num_features, generator=generator)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model


def _cnn() -> nn.Module:
    return _randomise(ResidualNetwork())


def _mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(192, 20), nn.ReLU(inplace=True), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 5)]
    return nn.Sequential(*layers)


def _vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 9}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    generator = torch.Generator().manual_seed(8)
    # As initialised, blocks hardly change their input; trained ones do.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


CNN_LAYERS = "norm relu@input blocks blocks.1.bn2 blocks.1.shortcut blocks.2.act1 head@input"
VIT_LAYERS = (
    "blocks blocks:class_token blocks.1:patch_tokens blocks.2:mean blocks.1.attn "
    "mlp_neurons attention_channels attention_heads"
)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "cnn": (_cnn, 16, CNN_LAYERS),
    "mlp": (_mlp, 8, "1 2 3@input 4"),
    "vit": (_vit, 32, VIT_LAYERS),
}


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, list[str]]:
    """A network in training mode, three images, and layers to explain."""
    return _network(request.param)


@pytest.fixture
def cnn() -> tuple[nn.Module, Tensor]:
    model, images, _ = _network("cnn")
    return model, images


@pytest.fixture
def vit() -> tuple[nn.Module, Tensor]:
    model, images, _ = _network("vit")
    return model, images


@pytest.fixture
def mlp() -> tuple[nn.Module, Tensor]:
    model, images, _ = _network("mlp")
    return model, images


def _network(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    build, size, layers = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build(), torch.randn(3, 3, size, size), layers.split()
