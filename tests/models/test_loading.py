"""Models come out of a config's section ready to be explained, or with one clear line."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from codec_dist.config import ModelSection
from codec_dist.models import ModelError, Preprocessing, load_model

SMALL_VIT = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "num_classes": 7,
}
PREPARED = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.25]}
SOURCE = """
from torch import nn

def network(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

def dictionary():
    return {}

def broken():
    raise OSError("no such disk\\nsecond line")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a user's module, as under an installed command (not on the module path)."""
    (tmp_path / "own_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return tmp_path


def own(function: str = "network", **settings: object) -> ModelSection:
    values = {"spec": f"module:own_networks:{function}", "preprocessing": PREPARED, **settings}
    return ModelSection.model_validate(values)


def test_torchvision_model_with_its_own_preprocessing() -> None:
    loaded = load_model(ModelSection(spec="torchvision:resnet18", weights="none", options={"num_classes": 5}))
    assert loaded.classes == 5
    assert loaded.preprocessing == Preprocessing(224, 256, "bilinear", 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_timm_model_with_its_own_preprocessing() -> None:
    loaded = load_model(ModelSection(spec="timm:vit_tiny_patch16_224", weights="none", options=SMALL_VIT))
    assert loaded.classes == 7
    assert loaded.preprocessing == Preprocessing(32, 35, "bicubic", 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_configs_preprocessing_goes_first() -> None:
    section = ModelSection.model_validate(
        {"spec": "torchvision:resnet18", "weights": "none", "preprocessing": {"size": 64, "resize": 80}}
    )
    loaded = load_model(section)
    assert (loaded.preprocessing.size, loaded.preprocessing.resize) == (64, 80)


def test_a_function_in_the_current_folder_is_found(folder: Path) -> None:
    loaded = load_model(own(options={"width": 6}))
    assert isinstance(loaded.module[1], nn.Linear)
    assert (loaded.classes, loaded.module[1].out_features, loaded.preprocessing.resize) == (3, 6, 8)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    first, again, other = load_model(own(), seed=1), load_model(own(), seed=1), load_model(own(), seed=2)
    assert torch.equal(first.module[1].weight, again.module[1].weight)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_fingerprint_sees_every_weight_buffer_and_option(folder: Path) -> None:
    reference = load_model(own(), seed=0)
    state = {name: tensor.clone() for name, tensor in reference.module.state_dict().items()}
    seen = {reference.fingerprint, load_model(own(options={"width": 4}), seed=0).fingerprint}
    for name, tensor in state.items():
        changed = dict(state)
        changed[name] = tensor + (1 if tensor.dtype == torch.int64 else 1e-3)
        save_file(changed, folder / "changed.safetensors")
        seen.add(load_model(own(weights=str(folder / "changed.safetensors"))).fingerprint)
    assert len(seen) == 2 + len(state)


@pytest.mark.parametrize("form", ["safetensors", "state dict", "wrapped state dict", "without counters"])
def test_weights_from_a_file_give_the_same_model(folder: Path, form: str) -> None:
    reference = load_model(own(), seed=5)
    state = reference.module.state_dict()
    path = folder / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "without counters":
        torch.save({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    else:
        torch.save(state if form == "state dict" else {"epoch": 3, "state_dict": state}, path)
    loaded = load_model(own(weights=str(path)), seed=6)
    assert loaded.fingerprint == reference.fingerprint


def test_weights_that_do_not_fit_are_refused_with_the_first_problems(folder: Path) -> None:
    state = load_model(own()).module.state_dict()
    state["head.weight"] = torch.zeros(2)
    state["1.weight"] = torch.zeros(2, 64)
    del state["3.bias"], state["3.weight"]
    save_file(state, folder / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(own(weights=str(folder / "other.safetensors")))
    message = str(caught.value)
    assert "missing 3.weight and 1 more; unexpected head.weight" in message
    assert "misshaped 1.weight ([2, 64] in the file, [4, 64] in the model)" in message
    assert "\n" not in message


def test_files_that_are_not_weights_are_refused(folder: Path) -> None:
    (folder / "text.pt").write_text("hello")
    (folder / "text.safetensors").write_text("hello")
    (folder / "empty.pt").touch()
    torch.save([1, 2], folder / "list.pt")
    torch.save(nn.Linear(2, 2), folder / "module.pt")  # would run code of the file if it were unpickled
    for name, cause in (
        ("text.pt", "cannot be read as a plain state dict"),
        ("text.safetensors", "not a whole safetensors file"),
        ("empty.pt", "cannot be read as a plain state dict"),
        ("list.pt", "hold a list, not a state dict"),
        ("module.pt", "cannot be read as a plain state dict"),
        ("absent.pt", "there is no weights file"),
    ):
        with pytest.raises(ModelError, match=cause) as caught:
            load_model(own(weights=str(folder / name)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ("resnet18", "bad model spec 'resnet18'"),
        ("torchvison:resnet18", "did you mean torchvision"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19': did you mean .*resnet18"),
        ("timm:vit_tiny_patch16_223", "timm has no model 'vit_tiny_patch16_223': did you mean"),
        ("module:own_networks", "write module:PACKAGE.FILE:FUNCTION"),
        ("module:../own_networks:network", "write module:PACKAGE.FILE:FUNCTION"),
        ("module:own_network:network", "importing own_network failed: No module named 'own_network'"),
        ("module:own_networks:netwrok", "has no function 'netwrok'"),
        ("module:own_networks:dictionary", "gives a dict, not a torch.nn.Module"),
        ("module:own_networks:broken", "cannot be built: no such disk$"),
    ],
)
def test_a_bad_spec_is_refused_in_one_line(folder: Path, spec: str, cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        load_model(ModelSection(spec=spec, weights="none"))


def test_options_that_the_model_refuses_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be built: .*unexpected keyword argument 'depth'"):
        load_model(own(options={"depth": 3}))


def test_a_function_needs_preprocessing_from_the_config(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not say how its images are prepared: set model\.preprocessing"):
        load_model(own(preprocessing=None))
    options = {**SMALL_VIT, "in_chans": 1}
    with pytest.raises(ModelError, match="does not say how"):
        load_model(ModelSection(spec="timm:vit_tiny_patch16_224", weights="none", options=options))


def test_a_wrong_image_size_is_found_at_once(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not take images of \[1, 9, 9\].*see model\.preprocessing"):
        load_model(own(preprocessing={**PREPARED, "size": 9}))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # what Python itself does for a module known to be absent
    with pytest.raises(ModelError, match=rf"{library}:any needs {library}.*extra `vision`"):
        load_model(ModelSection(spec=f"{library}:any", weights="none"))
