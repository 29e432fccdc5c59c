"""SAEs in the layouts of SAELens and overcomplete, against what those libraries compute from the files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codec_dist.sae import SaeError, SparseAutoencoder, build, export_sae, import_sae

CHANNELS, MODES = 6, 10
OPTIONS = {"relu": {}, "topk": {"k": 3}, "batchtopk": {"k": 3}, "matryoshka": {"k": 3}, "jumprelu": {}, "gated": {}}
SCALINGS: list[dict[str, object]] = [{}, {"scaling": "per_channel"}, {"nonnegative": True}]


def make(name: str, **options: object) -> tuple[SparseAutoencoder, torch.Tensor]:
    """A float64 SAE in eval mode with weights as after a training, and rows ≤ 0."""
    sae = build(name, {"modes": MODES, **OPTIONS[name], **options}, CHANNELS, seed=1).double()
    generator = torch.Generator().manual_seed(0)
    rows = -3 * torch.rand(40, CHANNELS, generator=generator, dtype=torch.float64)
    sae.calibrate(rows, 0.8)
    sae.train().loss(rows)
    sae.after_step()
    with torch.no_grad():
        for label, parameter in sae.named_parameters():
            if label != "decoder_bias" or options.get("decoder_bias") != "zero":
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae.eval(), rows


def as_saelens(folder: Path, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loadings and reconstruction by the formulas of SAELens' inference classes."""
    w = load_file(folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text())
    x = rows - w["b_dec"] * config["apply_b_dec_to_input"]
    if config["architecture"] == "gated":
        fires = (x @ w["W_enc"] + w["b_gate"] > 0).to(rows)
        loadings = fires * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        before = x @ w["W_enc"] + w["b_enc"]
        loadings = before.relu()
        if config["architecture"] == "jumprelu":
            loadings = loadings * (before > w["threshold"])
        if config["architecture"] == "topk":
            top = before.topk(config["k"])
            loadings = torch.zeros_like(before).scatter(1, top.indices, top.values.relu())
    return loadings, loadings @ w["W_dec"] + w["b_dec"]


def as_overcomplete(folder: Path, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loadings and reconstruction by the formulas of overcomplete's classes."""
    w = load_file(folder / "state_dict.safetensors")
    config = json.loads((folder / "config.json").read_text())
    loadings = (rows @ w["encoder.final_block.0.weight"].T + w["encoder.final_block.0.bias"]).relu()
    if config["class"] == "TopKSAE":
        top = loadings.topk(config["arguments"]["top_k"])
        loadings = torch.zeros_like(loadings).scatter(1, top.indices, top.values)
    if config["class"] == "JumpSAE":
        loadings = loadings.masked_fill(loadings < w["thresholds"].exp(), 0)
    return loadings, loadings @ (w["dictionary._weights"] * w["dictionary.multiplier"].exp())


@pytest.mark.parametrize("options", SCALINGS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_saelens_would_compute_the_same_and_reading_it_back_too(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    sae, rows = make(name, **options)
    loadings = sae.encode(rows)
    assert 0 < (loadings > 0).double().mean() < 1
    export_sae(sae, tmp_path, layout="saelens")
    found, reconstruction = as_saelens(tmp_path, rows)
    torch.testing.assert_close(found, loadings)
    torch.testing.assert_close(reconstruction, sae(rows))
    back = import_sae(tmp_path, layout="saelens")
    torch.testing.assert_close(back.encode(rows), loadings)
    torch.testing.assert_close(back(rows), sae(rows))
    torch.testing.assert_close(back.dictionary, sae.dictionary * sae.scale)


@pytest.mark.parametrize("bias", ["none", "zero"])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "gated"])
def test_overcomplete_would_compute_the_same_and_reading_it_back_too(tmp_path: Path, name: str, bias: str) -> None:
    sae, rows = make(name, decoder_bias=bias, scaling="per_channel")
    export_sae(sae, tmp_path, layout="overcomplete")
    found, reconstruction = as_overcomplete(tmp_path, rows)
    torch.testing.assert_close(found, sae.encode(rows))
    torch.testing.assert_close(reconstruction, sae(rows))
    back = import_sae(tmp_path, layout="overcomplete")
    torch.testing.assert_close(back.encode(rows), sae.encode(rows))
    torch.testing.assert_close(back(rows), sae(rows))


def test_a_saelens_sae_that_leaves_the_bias_on_its_input_is_read(tmp_path: Path) -> None:
    for name in ("relu", "gated"):
        sae, rows = make(name)
        export_sae(sae, tmp_path, layout="saelens")
        config = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
        loadings, reconstruction = as_saelens(tmp_path, rows)
        back = import_sae(tmp_path, layout="saelens")
        torch.testing.assert_close(back.encode(rows), loadings)
        torch.testing.assert_close(back(rows), reconstruction)


def test_a_topk_sae_of_saelens_before_version_6_is_read(tmp_path: Path) -> None:
    sae, rows = make("topk")
    export_sae(sae, tmp_path, layout="saelens")
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    torch.testing.assert_close(import_sae(tmp_path, layout="saelens")(rows), sae(rows))


def test_normalized_dictionaries_of_overcomplete_are_read(tmp_path: Path) -> None:
    sae, rows = make("relu", decoder_bias="none", scaling="none")
    export_sae(sae, tmp_path, layout="overcomplete")
    state = load_file(tmp_path / "state_dict.safetensors")
    norms = state["dictionary._weights"].norm(dim=1, keepdim=True)
    state["dictionary.multiplier"] = torch.tensor(0.5).double()
    save_file(state, tmp_path / "state_dict.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["arguments"]["dictionary_params"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = sae.encode(rows) @ (state["dictionary._weights"] / norms * torch.tensor(0.5).double().exp())
    torch.testing.assert_close(import_sae(tmp_path, layout="overcomplete")(rows), expected, rtol=1e-6, atol=1e-6)


def test_formulations_that_do_not_match_are_refused(tmp_path: Path) -> None:
    stsae = build("stsae", {"hidden": 8}, CHANNELS)
    for layout in ("saelens", "overcomplete"):
        with pytest.raises(SaeError, match="no SAE like 'stsae'"):
            export_sae(stsae, tmp_path, layout=layout)
    with pytest.raises(SaeError, match="no SAE like 'pca'"):
        export_sae(build("pca", {}, CHANNELS), tmp_path, layout="saelens")
    with pytest.raises(SaeError, match="no SAE like 'gated'"):
        export_sae(make("gated", decoder_bias="none")[0], tmp_path, layout="overcomplete")
    with pytest.raises(SaeError, match="decoder_bias = none"):
        export_sae(make("relu")[0], tmp_path, layout="overcomplete")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"rescale_acts_by_decoder_norm": True}, "fold_W_dec_norm"),
        ({"architecture": "jumprelu"}, "no 'threshold'"),
    ],
)
def test_saelens_files_of_another_formulation_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    export_sae(make("relu")[0], tmp_path, layout="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(SaeError, match=message):
        import_sae(tmp_path, layout="saelens")


def test_overcomplete_files_of_another_formulation_are_refused(tmp_path: Path) -> None:
    export_sae(make("relu", decoder_bias="none")[0], tmp_path, layout="overcomplete")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"class": "MpSAE"}, "'MpSAE'"),
        ({"arguments": {"dictionary_params": {"normalization": "l1"}}}, "'l1'"),
        ({"class": "TopKSAE"}, "no 'top_k'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(SaeError, match=message):
            import_sae(tmp_path, layout="overcomplete")
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "state_dict.safetensors")
    save_file(state | {"encoder.final_block.1.weight": torch.ones(3)}, tmp_path / "state_dict.safetensors")
    with pytest.raises(SaeError, match="not linear"):
        import_sae(tmp_path, layout="overcomplete")


def test_missing_and_damaged_files_and_unknown_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match=r"must hold cfg\.json"):
        import_sae(tmp_path, layout="saelens")
    sae, _ = make("relu")
    with pytest.raises(SaeError, match="choose saelens or overcomplete"):
        export_sae(sae, tmp_path, layout="saelenz")
    export_sae(sae, tmp_path, layout="saelens")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(SaeError, match="cannot be read"):
        import_sae(tmp_path, layout="saelens")
    save_file({"W_enc": torch.ones(3, 4), "W_dec": torch.ones(5, 3), "b_dec": torch.ones(3), "b_enc": torch.ones(4)},
              tmp_path / "sae_weights.safetensors")  # fmt: skip
    with pytest.raises(SaeError, match="do not fit each other"):
        import_sae(tmp_path, layout="saelens")
