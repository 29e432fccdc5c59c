"""Weights and preprocessing belong together: published files are recognised, own files must bring their own."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torchvision.models import get_model_weights, list_models

from codec_dist.config import ModelSection
from codec_dist.models import ModelError, Preprocessing, load_model
from codec_dist.models.published import from_torchvision, recognise

OWN = {"size": 64, "resize": 72, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
OWN_PREPROCESSING = Preprocessing(64, 72, "bilinear", 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))


def section(spec: str, weights: Path | str, **settings: object) -> ModelSection:
    return ModelSection.model_validate({"spec": spec, "weights": str(weights), **settings})


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, torch.Tensor]:
    return torchvision.models.resnet18(weights=None).state_dict()


def gradient_image() -> Image.Image:
    ramp = torch.arange(300 * 400).reshape(300, 400, 1) % torch.tensor([251, 241, 239])
    return Image.fromarray(ramp.to(torch.uint8).numpy())


@pytest.mark.parametrize("version", ["IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_published_file_of_torchvision_brings_its_own_preprocessing(version: str, tmp_path: Path) -> None:
    weights = get_model_weights("resnet50")[version]
    path = tmp_path / weights.url.rpartition("/")[2]
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), path)
    loaded = load_model(section("torchvision:resnet50", path))
    image = gradient_image()
    assert torch.equal(loaded.preprocessing(image), weights.transforms()(image))
    assert any(str(weights) in note for note in loaded.notes)
    # The config that a run keeps gives the same without the file's name.
    renamed = path.rename(tmp_path / "renamed.pth")
    again = load_model(loaded.section.model_copy(update={"weights": str(renamed)}))
    assert (again.preprocessing, again.fingerprint) == (loaded.preprocessing, loaded.fingerprint)


def test_every_published_file_of_torchvisions_classifiers_is_recognised_as_itself(tmp_path: Path) -> None:
    recognised = 0
    for name in list_models(module=torchvision.models):
        sets = dict(get_model_weights(name).__members__)
        for weights in sets.values():
            found = recognise(tmp_path / weights.url.rpartition("/")[2], {each: each.url for each in sets.values()})
            assert found is not None
            assert found[0] is weights
            preprocessing, transform = from_torchvision(weights.transforms()), weights.transforms()
            assert preprocessing is not None
            assert [preprocessing.size, preprocessing.resize] == [*transform.crop_size, *transform.resize_size]
            recognised += 1
    assert recognised > 100


def test_published_file_under_another_name_is_recognised_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"some weights")
    digits = hashlib.sha256(b"some weights").hexdigest()[:8]
    published = {"first": "https://host/net-0123abcd.pth", "second": f"https://host/net-{digits}.pth"}
    found = recognise(tmp_path / "weights.pth", published)
    assert found is not None
    assert found[0] == "second"
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    assert recognise(tmp_path / "weights.pth", published) is None


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("net-0123abcd.pth", True),
        ("copy_of_net-0123abcd.safetensors", True),
        ("net-0123abcd-finetuned.pth", False),
        ("net-0123abcde.pth", False),
        ("net.pth", False),
    ],
)
def test_name_that_ends_otherwise_is_of_another_file(name: str, known: bool, tmp_path: Path) -> None:
    assert (recognise(tmp_path / name, {"set": "https://host/net-0123abcd.pth"}) is not None) == known


def test_weight_set_is_named_in_the_config(resnet_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    # torch.hub takes a file that it finds in its folder for the download.
    file = get_model_weights("resnet18")["IMAGENET1K_V1"].url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(resnet_state, tmp_path / "checkpoints" / file)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    try:
        loaded = [
            load_model(section("torchvision:resnet18", name))
            for name in ("IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT", "default")
        ]
    finally:
        torch.hub.set_dir(before)
    assert torch.equal(loaded[0].module.state_dict()["fc.weight"], resnet_state["fc.weight"])
    assert len({each.fingerprint for each in loaded}) == 1
    assert all(each.preprocessing.resize == 256 for each in loaded)


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("torchvision:resnet18", "IMAGENET1K_V2", r"no weight set 'IMAGENET1K_V2': it has IMAGENET1K_V1"),
        ("torchvision:resnet18", "ResNet50_Weights.IMAGENET1K_V1", "no weight set"),
        ("timm:resnet18", "IMAGENET1K_V1", r"timm:MODEL\.SET"),
    ],
)
def test_weight_set_that_the_model_does_not_have_is_refused(spec: str, weights: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(section(spec, weights))


@pytest.mark.parametrize(
    ("name", "options"), [("inception_v3", {"init_weights": False}), ("googlenet", {"init_weights": False})]
)
def test_published_file_computes_what_torchvisions_own_model_computes(name: str, options: dict, tmp_path: Path) -> None:
    """Its builder changes more than the weights when it is given any: the input is converted."""
    weights = get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    state = torchvision.models.get_model(name, weights=None, **options).state_dict()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    torch.save(state, path)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    try:
        reference = torchvision.models.get_model(name, weights=weights).eval()
    finally:
        torch.hub.set_dir(before)
    loaded = load_model(section(f"torchvision:{name}", path, options=options))
    images = torch.randn(2, *loaded.preprocessing.shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), reference(images))
    assert loaded.section.options == {**options, "transform_input": True}
    # An own file does not say whether it was trained so.
    own = path.rename(tmp_path / "own.pth")
    torch.save({**state, "fc.bias": state["fc.bias"] + 1}, own)
    with pytest.raises(ModelError, match=r"model\.options\.transform_input"):
        load_model(section(f"torchvision:{name}", own, options=options, preprocessing=OWN | {"size": 299}))


def test_own_weights_without_preprocessing_are_refused_with_the_keys_to_write(
    resnet_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(resnet_state, tmp_path / "own.pth")
    with pytest.raises(
        ModelError, match=r"own\.pth does not say how .*model\.preprocessing .*size.*mean.*std"
    ) as caught:
        load_model(section("torchvision:resnet18", tmp_path / "own.pth"))
    assert "\n" not in str(caught.value)
    # Given in the config, they are used as they are.
    loaded = load_model(section("torchvision:resnet18", tmp_path / "own.pth", preprocessing=OWN))
    assert loaded.preprocessing == OWN_PREPROCESSING


@pytest.mark.parametrize("place", ["sidecar", "metadata"])
def test_preprocessing_stands_beside_own_weights(
    place: str, resnet_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    save_file(resnet_state, path, {"preprocessing": json.dumps(OWN)} if place == "metadata" else None)
    if place == "sidecar":
        (tmp_path / "own.safetensors.preprocessing.json").write_text(json.dumps(OWN))
    loaded = load_model(section("torchvision:resnet18", path))
    assert loaded.preprocessing == OWN_PREPROCESSING
    kept = loaded.section.preprocessing
    assert kept is not None
    assert str(path) in str(kept.source)
    assert (kept.size, kept.resize, kept.mean) == (64, 72, (0.4, 0.5, 0.6))
    # The config goes before what stands beside the weights.
    other = load_model(section("torchvision:resnet18", path, preprocessing={"size": 32}))
    assert other.preprocessing.size == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[64]", "holds a list"),
        ('{"size": 64, "sise": 3}', "sise"),
        ('{"size": 0}', "size"),
        ('{"mean": [0, 0, 0]}', "size"),
        ('{"size": 64, "channels": 1}', "mean has 3 values"),
    ],
)
def test_settings_beside_the_weights_that_cannot_be_used_are_named(
    text: str, message: str, resnet_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(resnet_state, tmp_path / "own.pth")
    (tmp_path / "own.pth.preprocessing.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(section("torchvision:resnet18", tmp_path / "own.pth"))
    assert "\n" not in str(caught.value)


def test_settings_that_differ_from_the_weights_own_are_said(
    resnet_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(resnet_state, path)
    loaded = load_model(section("torchvision:resnet18", path, preprocessing={"size": 224, "resize": 232}))
    assert any("ResNet18_Weights.IMAGENET1K_V1" in note and "256" in note for note in loaded.notes)


@pytest.mark.parametrize("way", ["file name", "cache folder", "config.json"])
def test_published_file_of_timm_brings_its_own_preprocessing(way: str, tmp_path: Path) -> None:
    tag = {"file name": "resnet18.a1_in1k", "cache folder": "resnet18.a3_in1k", "config.json": "resnet18.a2_in1k"}[way]
    config = timm.get_pretrained_cfg(tag).to_dict()
    folder = tmp_path / f"models--timm--{tag}" if way == "cache folder" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / (config["url"].rpartition("/")[2] if way == "file name" else "model.safetensors")
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(state, path) if way == "file name" else save_file(state, path)
    if way == "config.json":
        (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": config}))
    loaded = load_model(section("timm:resnet18", path))
    image = gradient_image()
    expected = create_transform(**resolve_data_config({}, pretrained_cfg=config))(image)
    assert torch.equal(loaded.preprocessing(image), expected)
    # Not by another architecture's weights.
    with pytest.raises(ModelError, match=r"does not say how|do not fit"):
        load_model(section("timm:resnet26", path))


def test_own_weights_for_a_model_of_timm_need_preprocessing(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="does not say how"):
        load_model(section("timm:resnet18.a1_in1k", tmp_path / "model.safetensors"))


NETWORK = """
from torch import nn

class Network(nn.Sequential):
    preprocessing = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.25]}

def network():
    return Network(nn.Flatten(), nn.Linear(256, 3))
"""


def test_own_model_says_itself_how_its_images_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prepared_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_model(section("module:prepared_network:network", "default"))
    assert loaded.preprocessing == Preprocessing(16, 16, "bilinear", 1, (0.5,), (0.25,))
    assert any("attribute" in note for note in loaded.notes)
    # A file of weights may be of another training.
    torch.save(loaded.module.state_dict(), tmp_path / "own.pth")
    other = load_model(section("module:prepared_network:network", tmp_path / "own.pth"))
    assert other.preprocessing == loaded.preprocessing
