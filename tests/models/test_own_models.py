"""Models of a user's own: what their code raises is one line, and habits that do no harm work."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from codec_dist.attribution import Attributor, IntegratedGradients
from codec_dist.config import ModelSection
from codec_dist.models import ModelError, load_model, model_line

SOURCE = '''
import torch
from torch import nn

class Plain(nn.Module):
    """Shifts its input, then two layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def shifted(self, images):
        return images - 0.5

    def forward(self, images):
        return self.head(self.conv(self.shifted(images)).relu().mean(dim=(2, 3)))

class InPlace(Plain):
    def shifted(self, images):
        return images.sub_(0.5)

class Augmented(Plain):
    def shifted(self, images):
        images -= 0.5
        return images

class Inference(Plain):
    @torch.inference_mode()
    def forward(self, images):
        return super().forward(images)

class NoParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(3, 64))
        self.flat = nn.Flatten()

    def forward(self, images):
        return self.flat(images) @ self.weight.T

class Unlucky(Plain):
    def forward(self, images):
        if images.sum() != 0:
            raise KeyError("no such key\\n\\x1b[1mthe second line")
        return super().forward(images)

class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        raise ValueError("there is no way back")

class OneWay(Plain):
    def forward(self, images):
        return self.head(Backwards.apply(self.conv(images)).mean(dim=(2, 3)))

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3)
        self.head = nn.LazyLinear(3)

    def forward(self, images):
        return self.head(self.conv(images).relu().flatten(1))

def scripted():
    return torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)))

def partly_scripted():
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3))), nn.Flatten(), nn.Linear(144, 3))

def quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), {nn.Linear})

def made_in_inference_mode():
    with torch.inference_mode():
        return Plain()
'''
PREPARED = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.25]}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def load(name: str, **settings: object) -> nn.Module:
    values = {"spec": f"module:odd_networks:{name}", "weights": "none", "preprocessing": PREPARED, **settings}
    return load_model(ModelSection.model_validate(values)).module


def contributions(model: nn.Module, images: torch.Tensor, layer: str = "conv") -> torch.Tensor:
    result = Attributor(model, [layer], IntegratedGradients(steps=3, points="uniform"), microbatch=2)(images)
    return torch.cat([result[layer].positive, result[layer].negative])


@pytest.mark.parametrize("name", ["InPlace", "Augmented", "made_in_inference_mode"])
def test_input_changed_in_place_and_weights_of_inference_mode_are_no_obstacle(name: str) -> None:
    images = torch.randn(4, 1, 8, 8)
    kept = images.clone()
    expected = contributions(load("Plain").double(), images.double())
    model = load(name)
    assert torch.equal(model(images), model(images))
    torch.testing.assert_close(contributions(model, images).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(images, kept)


def test_engine_alone_keeps_images_that_a_model_changes(tmp_path: Path) -> None:
    import odd_networks

    torch.manual_seed(0)
    plain = odd_networks.Plain()
    changing = odd_networks.InPlace()
    changing.load_state_dict(plain.state_dict())
    images = torch.randn(3, 1, 8, 8)
    kept = images.clone()
    assert torch.equal(contributions(changing, images), contributions(plain, images))
    assert torch.equal(images, kept)


def test_layers_that_take_their_size_from_the_first_image_work() -> None:
    assert contributions(load("Lazy"), torch.randn(3, 1, 8, 8)).shape == (6, 4)


def test_model_without_parameters_works() -> None:
    images = torch.randn(3, 1, 8, 8)
    assert contributions(load("NoParameters"), images, "flat").shape == (6, 64)


@pytest.mark.parametrize(
    ("name", "layer", "kind", "message"),
    [
        ("Unlucky", "conv", KeyError, r"the model raised KeyError while .*no such key"),
        ("OneWay", "conv", ValueError, r"the model raised ValueError while .*there is no way back"),
        ("Inference", "conv", RuntimeError, r"the model raised RuntimeError while .*[Ii]nference"),
        ("partly_scripted", "0.0", RuntimeError, r"the model raised RuntimeError while layer 0\.0 .*ScriptModule"),
    ],
)
def test_what_a_model_raises_is_one_line(name: str, layer: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        contributions(load(name), torch.randn(2, 1, 8, 8), layer)
    line = model_line(caught.value)
    assert line is not None
    assert re.search(message, line)
    assert "\n" not in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("name", "message"), [("scripted", "TorchScript"), ("quantised", "quantised"), ("Plain", "raised RuntimeError")]
)
def test_what_cannot_be_explained_is_refused_when_it_is_loaded(name: str, message: str) -> None:
    settings = {"preprocessing": {**PREPARED, "size": 2}} if name == "Plain" else {}
    with pytest.raises(ModelError, match=message) as caught:
        load(name, **settings)
    assert "\n" not in str(caught.value)


def test_lack_of_memory_in_a_model_stays_what_it_is() -> None:
    """The engine answers it with smaller batches."""

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.largest = nn.Flatten(), 2

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > self.largest:
                torch.empty(1 << 60)
            return self.layer(images)

    result = Attributor(Greedy(), ["layer"], IntegratedGradients(steps=2, points="uniform"), microbatch=4)(
        torch.randn(4, 3)
    )
    assert result["layer"].positive.shape == (4, 3)
