"""Problems in what a person has: each is one clear line, exit code 2, and nothing half-written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extraction_without_ray import extract_here
from safetensors.torch import save_file

from codec_dist.cli import main
from codec_dist.config import load_config
from codec_dist.demo.classifier import digits_classifier
from codec_dist.shards import digits, pack

VALUES: dict[str, Any] = {
    "run": {"directory": "run"},
    "data": {"shards": "shards"},
    "model": {
        "spec": "module:codec_dist.demo.classifier:digits_classifier",
        "weights": "none",
        "preprocessing": {"size": 16, "channels": 1, "mean": [0.3], "std": [0.38]},
    },
    "attribution": {"layers": ["blocks.5"], "method": {"name": "integrated_gradients", "options": {"steps": 1}}},
    "cluster": {"actors": 1},
    "tracking": {"mode": "disabled"},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    samples, classes = digits()
    few = [sample for sample in samples if int(sample.key.removeprefix("digit-")) < 60]
    pack(few, tmp_path / "shards", samples_per_shard=30, classes=classes)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(words)) == 2
    # Stages that were done before, and progress, may be told above; the problem is the last line, alone.
    *told, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith(("pack: ", "prepare: ", "extract: ")) for line in told), told
    return last


def test_missing_shards_folder_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "extract", str(config), "--data.shards", str(config.parent / "gone"))
    assert str(config.parent / "gone") in line
    assert not (config.parent / "run" / "store").exists()


def test_missing_shard_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "shards" / "shard-000001.tar").unlink()
    assert "shard-000001.tar" in refused(capsys, "extract", str(config))
    assert not (config.parent / "run" / "store" / "samples.parquet").exists()


@pytest.mark.ray
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.97], ids=lambda kept: f"{kept:.0%} kept")
def test_tar_cut_short_is_named(
    config: Path, kept: float, ray_cluster: object, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = config.parent / "shards" / "shard-000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[: int(len(content) * kept)])
    assert "shard-000001.tar" in refused(capsys, "extract", str(config))
    assert not (config.parent / "run" / "store" / "ledger" / "000001.json").exists()


def test_unknown_layer_is_answered_with_the_nearest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "extract", str(config), "--attribution.layers", "[blocks.6]")
    assert "'blocks.6'" in line
    assert "blocks.5" in line
    assert not (config.parent / "run" / "store").exists()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("missing", "there is no weights file"),
        ("another model", "missing stem.0.weight"),
        ("another shape", "head.weight"),
        ("no weights at all", "weights.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    config: Path, problem: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = config.parent / "weights.safetensors"
    state = digits_classifier().state_dict()
    if problem == "another model":
        save_file({f"other.{name}": value for name, value in state.items()}, weights)
    elif problem == "another shape":
        save_file(state | {"head.weight": torch.zeros(7, 128)}, weights)
    elif problem == "no weights at all":
        weights.write_bytes(b"\x80\x04 certainly not weights")
    assert message in refused(capsys, "extract", str(config), "--model.weights", str(weights))


def test_own_weights_without_preprocessing_are_refused_before_anything_starts(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = config.parent / "weights.safetensors"
    save_file(digits_classifier().state_dict(), weights)
    line = refused(capsys, "extract", str(config), "--model.weights", str(weights), "--model.preprocessing", "null")
    assert str(weights) in line
    assert "model.preprocessing" in line
    assert not (config.parent / "run").exists()


RAISING = """
from codec_dist.demo.classifier import DigitsClassifier

class Raising(DigitsClassifier):
    def forward(self, images):
        if images.std() > 0:
            raise RuntimeError("expected a blank image\\nat line 7")
        return super().forward(images)
"""


def test_error_of_the_model_itself_is_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.parent / "raising_network.py").write_text(RAISING)
    monkeypatch.syspath_prepend(config.parent)
    line = refused(capsys, "extract", str(config), "--model.spec", "module:raising_network:Raising")
    assert "the model raised RuntimeError while" in line
    assert "expected a blank image" in line


def test_wrong_image_size_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "[3, 16, 16]" in refused(capsys, "extract", str(config), "--model.preprocessing", "{size: 16, channels: 3}")


def test_label_out_of_range_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, classes = digits()
    seven = [sample for sample in samples if int(sample.key.removeprefix("digit-")) < 60]
    labelled = [dataclasses.replace(sample, label=11) for sample in seven]
    pack(labelled, config.parent / "more", samples_per_shard=30, classes=[*classes, "ten", "eleven"])
    line = refused(capsys, "extract", str(config), "--data.shards", str(config.parent / "more"))
    assert "11" in line
    assert "10" in line


def test_store_of_another_config_is_refused_field_by_field(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = extract_here(load_config(config))
    line = refused(capsys, "extract", str(config), "--attribution.method.options.steps", "7")
    assert "steps: 1 in the store, 7 requested" in line
    main(["store", "digest", str(config.parent / "run")])
    assert capsys.readouterr().out.splitlines()[-1] == before
