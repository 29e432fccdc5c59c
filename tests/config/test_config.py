"""A config is validated once, says what is wrong in one line, and survives a round trip."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.config import (
    Config,
    ConfigError,
    SaeSection,
    config_reference,
    config_schema,
    load_config,
    parse_config,
    save_config,
    store_of_run,
)

MINIMAL: dict[str, Any] = {
    "run": {"directory": "."},
    "data": {"shards": "shards"},
    "model": {"spec": "torchvision:resnet18", "weights": "none"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_relative_paths_are_taken_from_the_files_folder(file: Path) -> None:
    config = load_config(file)
    assert config.run.directory == str(file.parent)
    assert config.data.shards == str(file.parent / "shards")
    assert config.model.weights == "none"


def test_urls_are_left_alone(file: Path) -> None:
    assert load_config(file, ["--data.shards", "s3://bucket/shards"]).data.shards == "s3://bucket/shards"


def test_the_store_is_in_the_run_unless_it_is_said_to_be_elsewhere(file: Path, tmp_path: Path) -> None:
    assert load_config(file).store_location == store_of_run(tmp_path) == str(tmp_path / "store")
    url = "s3://bucket/run/store"
    save_config(load_config(file, ["--store.location", url]), file)
    assert load_config(file).store_location == store_of_run(tmp_path) == url
    file.write_text(yaml.safe_dump(MINIMAL | {"store": {"location": "../fast/store"}}))
    assert load_config(file).store_location == store_of_run(tmp_path) == str(tmp_path.parent / "fast" / "store")
    assert store_of_run(tmp_path / "no-run") == str(tmp_path / "no-run" / "store")


def test_relative_paths_in_overrides_are_taken_from_the_current_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(file, ["--model.weights", "w.safetensors"]).model.weights == str(
        tmp_path / "elsewhere" / "w.safetensors"
    )


def test_overrides_reach_options_and_list_items_of_defaults(file: Path) -> None:
    words = ["--attribution.method.options.steps", "20", "--sae.groups.0.training.epochs=3", "--data.split.fit", ".5"]
    config = load_config(file, [*words, "--data.split.evaluate", "0.3"])
    assert config.attribution.method.options == {"steps": 20}
    assert config.sae.groups[0].training.epochs == 3
    assert config.data.split.model_dump() == {"fit": 0.5, "select": 0.2, "evaluate": 0.3}


def test_choosing_another_method_drops_the_defaults_options(file: Path) -> None:
    config = load_config(file, ["--attribution.method", "{name: other}"])
    assert config.attribution.method.options == {}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("off", "off"),
        ("2024-05-01", "2024-05-01"),
        ("true", True),
        ("3", 3),
    ],
)
def test_values_mean_what_people_write(file: Path, word: str, value: object) -> None:
    config = load_config(file, ["--model.options.anything", word])
    assert config.model.options == {"anything": value}
    assert type(config.model.options["anything"]) is type(value)


def test_a_number_may_be_a_name(file: Path) -> None:
    assert load_config(file, ["--run.name", "2024"]).run.name == "2024"


@pytest.mark.parametrize("name", ["0E0", "1e3", "12", "true", "no", "2024-01-01", "null", "~"])
def test_a_name_that_looks_like_something_else_stays_a_name(name: str, tmp_path: Path) -> None:
    config = parse_config({**MINIMAL, "run": {"directory": "/somewhere", "name": name}})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").run.name == name


def test_saved_config_can_be_moved_with_its_folder(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["--model.weights", str(tmp_path / "w.safetensors")])
    save_config(config, file)
    assert load_config(file) == config
    moved = tmp_path / "moved"
    moved.mkdir()
    file.rename(moved / "config.yaml")
    assert load_config(moved / "config.yaml").model.weights == str(moved / "w.safetensors")


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 0.6), st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_any_valid_config_survives_a_round_trip(tmp_path_factory: Any, seed: int, fit: float, name: str) -> None:
    split = {"fit": fit, "select": 0.2, "evaluate": 0.8 - fit}
    run = {"directory": "/somewhere", "seed": seed, "name": name}
    config = parse_config({**MINIMAL, "run": run, "data": {"shards": "/elsewhere", "split": split}})
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attribution.metod", "x"], "unknown key `attribution.metod`: did you mean method?"),
        (["--modles.x", "1"], "unknown key `modles`: did you mean"),
        (["--sae.groups", "[{layer: 1}]"], "unknown key `sae.groups.0.layer`: did you mean layers?"),
        (["--run.seed", "-1"], "`run.seed`: Input should be greater than or equal to 0 (found -1)"),
        (["--data.split.fit", ".7"], "fit + select + evaluate is 1.1, not 1"),
        (["--data.limit", "many"], "`data.limit`"),
        (["--sae.groups.4.layers", "[a]"], "there is no item '4' (there are 1)"),
        (["--run.seed.deep", "1"], "run.seed holds a value, not settings"),
        (["--run.seed"], "the override --run.seed has no value"),
        (["run.seed", "1"], "unexpected argument 'run.seed'"),
        (["--run.name", "[unclosed"], "the value of --run.name cannot be read"),
        (["--attribution.microbatch", "0"], "`attribution.microbatch`"),
        (["--sae.evaluations", ".nan"], "`sae.evaluations`"),
    ],
)
def test_bad_override_is_one_clear_line(file: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(file, words)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run: [", "is not valid YAML"),
        (b"just words", "holds no sections"),
        (b"", "holds no sections"),
        (b"\xff\xfe\x00", "is not a UTF-8 text file"),
        (b"run: {directory: .}", "`data.shards` is missing: set it in the file or with --data.shards VALUE"),
        (b"run: 5", "`run`"),
        (b"{run: {directory: .}, data: {shards: s}, model: {spec: s, weight: w}}", "did you mean weights?"),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*nowhere.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_setting_is_explained() -> None:
    reference = config_reference()
    for section, field in Config.model_fields.items():
        for name, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"--{section}.{name}" in reference
            assert inner.description, f"{section}.{name} has no help"
    assert "properties" in config_schema()


def test_config_is_frozen() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ("IMAGENET1K_V1", "set"),
        ("ResNet50_Weights.IMAGENET1K_V2", "set"),
        ("DEFAULT", "set"),
        ("default", "default"),
        ("none", "none"),
        ("weights.pth", "file"),
        ("./WEIGHTS", "file"),
        ("./none", "file"),
        ("models/IMAGENET1K_V1", "file"),
    ],
)
def test_names_of_weight_sets_are_no_paths(tmp_path: Path, weights: str, kind: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run: {{directory: run}}\ndata: {{shards: shards}}\nmodel: {{spec: a, weights: {weights}}}\n")
    config = load_config(path)
    assert config.model.weights_kind == kind
    assert config.model.weights == (os.path.normpath(tmp_path / weights) if kind == "file" else weights)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("size", [0, -1, "large", [8], [8, 0], [8, 8, 8], 8.5, True])
def test_sizes_that_are_no_pixels_are_refused(size: object) -> None:
    model = {"spec": "a", "preprocessing": {"size": size}}
    values = {"run": {"directory": "r"}, "data": {"shards": "s"}, "model": model}
    with pytest.raises(ConfigError, match=r"model\.preprocessing\.size"):
        parse_config(values)


def test_a_renamed_value_is_taken_for_one_more_version(caplog: pytest.LogCaptureFixture) -> None:
    assert SaeSection(spread="bundles").spread == "saes"
    assert "is called `saes` now" in caplog.text
