"""SAEs on disk: exact round trips, and clear words about what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codec_dist.sae import ARCHITECTURES, SaeError, SparseAutoencoder, StsaeAutoencoder, build

EXAMPLES = [
    ("topk", {"expansion": 2, "k": 3}),
    ("stsae", {"hidden": 9, "threshold": 0.5, "nonnegative": True, "initial_l0": 2}),
    ("relu", {"normalize": False, "decoder_bias": "none"}),
    ("batchtopk", {"k": 3, "scaling": "none"}),
    ("matryoshka", {"k": 3, "prefixes": [0.5, 1]}),
    ("jumprelu", {"decoder_bias": "mean"}),
    ("gated", {"scaling": "per_channel"}),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("topk", {"modes": 12, "k": 3}, channels=6).save(tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize(("name", "options"), EXAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_sae_is_the_saved_one(
    tmp_path: Path, name: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    sae, rows = build(name, options, channels=6, seed=3).to(dtype), torch.rand(20, 6, dtype=dtype)
    sae.calibrate(rows, 0.1 + 0.2)
    sae.train().loss(rows)
    sae.after_step()
    sae.save(tmp_path / "sae", details={"layer": "blocks.0"})
    loaded = SparseAutoencoder.load(tmp_path / "sae")
    assert type(loaded) is type(sae)
    assert not loaded.training
    assert (loaded.scale, loaded.options) == (sae.scale, sae.options)
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    for label, tensor in sae.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[label], tensor, rtol=0, atol=0)
    sae.eval()
    torch.testing.assert_close(loaded.encode(rows), sae.encode(rows), rtol=0, atol=0)
    torch.testing.assert_close(loaded(rows), sae(rows), rtol=0, atol=0)
    assert json.loads((tmp_path / "sae/config.json").read_text())["details"] == {"layer": "blocks.0"}


@pytest.mark.parametrize(("name", "options"), EXAMPLES)
def test_initial_weights_depend_on_the_seed_alone(name: str, options: dict[str, object]) -> None:
    first = build(name, options, channels=6, seed=1).state_dict()
    torch.rand(5)
    same, other = (build(name, options, channels=6, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["decoder"], other["decoder"])


@pytest.mark.parametrize("name", ["samples_since_fired", "decoder", "channel_scale"])
def test_weights_without_one_of_their_tensors_are_refused(name: str, tmp_path: Path) -> None:
    build("topk", {"modes": 9, "k": 2, "scaling": "per_channel"}, channels=4).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SaeError, match=f"do not fit its config.json: .*{name}"):
        SparseAutoencoder.load(tmp_path)


def test_every_architecture_is_registered() -> None:
    learned = ["batchtopk", "gated", "jumprelu", "matryoshka", "relu", "stsae", "topk"]
    assert list(ARCHITECTURES) == sorted([*learned, "nmf", "pca"])
    with pytest.raises(SaeError, match="did you mean topk"):
        build("topkk", {}, channels=4)


def test_a_missing_sae_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match=f"no SAE in {tmp_path}"):
        SparseAutoencoder.load(tmp_path)


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(SaeError, match=r"holds no model\.safetensors"):
        SparseAutoencoder.load(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_file_cut_short_is_refused(saved: Path, file: str, size: int) -> None:
    (saved / file).write_bytes((saved / file).read_bytes()[:size])
    with pytest.raises(SaeError, match="train the SAE again"):
        SparseAutoencoder.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 1"),
        ({"architecture": "unheard"}, "unknown SAE architecture"),
        ({"channels": "six"}, "'channels'"),
        ({"channels": 7}, "do not fit its config"),
        ({"scale": None}, "'scale'"),
        ({"options": {"k": 3, "mods": 5}}, "no option 'mods'"),
    ],
)
def test_a_config_that_describes_another_sae_is_refused(saved: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SaeError, match=message):
        SparseAutoencoder.load(saved)


def test_loading_as_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(SaeError, match="not a StsaeAutoencoder"):
        StsaeAutoencoder.load(saved)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_rows_that_do_not_vary_are_refused(scale: float) -> None:
    with pytest.raises(SaeError, match="must vary"):
        build("topk", {"k": 2}, channels=4).calibrate(torch.ones(3, 4), scale)
