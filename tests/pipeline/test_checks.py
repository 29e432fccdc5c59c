"""What later stages would refuse is refused at the start, by every command alike, before anything is written."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from digits_config import digits_values

from codec_dist.cli import main
from codec_dist.shards import digits, pack

VALUES = digits_values(
    {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "sae": {"groups": [{"architecture": {"name": "topk", "options": {"modes": 16, "k": 2}}}]},
        "tracking": {"mode": "disabled"},
    }
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    samples, classes = digits()
    pack(itertools.islice(samples, 60), folder / "shards", samples_per_shard=30, classes=classes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    concepts: dict[str, Any] = {
        "unknown": {"round": ["6", "six"]},
        "beyond": {"round": [10]},
        "good": {"round": [0, 6, 8, 9]},
    }
    for name, value in concepts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "broken.json").write_text("{")
    return path


# Overrides ({folder}: that of the config) and what the line must name: the setting or thing, and the nearest.
REFUSED = {
    "layer of a group": (["--sae.groups.0.layers", "[blocks.33]"], ["'blocks.33'", "blocks.3"]),
    "glob of a group": (["--sae.groups.0.layers", "['layer*']"], ["'layer*'"]),
    "quantity of a group": (
        ["--sae.groups.0.quantities", "[contribution-positiv]"],
        ["'contribution-positiv'", "contribution-positive"],
    ),
    "quantity that is not stored": (["--sae.groups.0.quantities", "[gradient-positive]"], ["'gradient-positive'"]),
    "option of an architecture": (["--sae.groups.0.architecture.options", "{modes: 4, k: 9}"], ["topk", "k"]),
    "layer of interventions": (["--interventions.layers", "[blocks.4]"], ["interventions.layers", "'blocks.4'"]),
    "quantity of interventions": (
        ["--interventions.quantities", "[activation-negative]"],
        ["interventions.quantities", "'activation-negative'"],
    ),
    "quantity without an SAE": (
        ["--sae.groups.0.quantities", "[activation-positive]", "--interventions.layers", "[blocks.5]"],
        ["interventions.quantities", "'contribution-positive'"],
    ),
    "quantity of two signs": (
        ["--sae.groups.0.quantities", "[contribution-both]", "--interventions.quantities", "[contribution-both]"],
        ["interventions.quantities", "'contribution-both'"],
    ),
    "layer and quantity that have no SAE together": (
        ["--sae.groups", "[{layers: [blocks.3], quantities: [contribution-positive]}, "
         "{layers: [blocks.5], quantities: [activation-positive]}]",
         "--interventions.layers", "[blocks.3]", "--interventions.quantities", "[activation-positive]"],
        ["interventions", "activation-positive", "blocks.3"],
    ),
    "stability of a single seed": (["--sae.selection.minimum_stability", "0.5"], ["minimum_stability", "seeds"]),
    "layer of visualization": (["--visualization.layers", "[block.5]"], ["visualization.layers", "blocks.5"]),
    "concepts that are not there": (["--modes.concepts", "{folder}/gone.json"], ["gone.json"]),
    "concepts that are no JSON": (["--modes.concepts", "{folder}/broken.json"], ["broken.json"]),
    "class of a concept": (["--modes.concepts", "{folder}/unknown.json"], ["'round'", "'six'"]),
    "class number of a concept": (["--modes.concepts", "{folder}/beyond.json"], ["10", "0 to 9"]),
    "class of a target": (["--attribution.target", "{name: class, options: {index: 10}}"], ["10"]),
    "class of a further target": (
        ["--attribution.further_targets", "[{name: class, options: {index: 12}}]"],
        ["12", "10 outputs"],
    ),
    "layer of the model": (["--attribution.layers", "[blocks.55]"], ["'blocks.55'", "blocks.5"]),
    "weights": (["--model.weights", "{folder}/gone.safetensors"], ["gone.safetensors"]),
    "split": (["--data.limit", "2"], ["part", "2 samples"]),
    "unknown architecture": (["--sae.groups.0.architecture.name", "topkk"], ["topkk", "topk"]),
}  # fmt: skip


# Each is tried with two of three commands, whose checks are the same: `config show`, and the others in turn.
TRIED = [
    pytest.param(command, problem, id=f"{' '.join(command)}-{problem}")
    for number, problem in enumerate(REFUSED)
    for command in (["config", "show"], [["run"], ["extract"]][number % 2])
]


@pytest.mark.parametrize(("command", "problem"), TRIED)
def test_it_is_refused_before_anything_starts(
    config: Path, command: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, named = REFUSED[problem]
    words = [word.replace("{folder}", str(config.parent)) for word in words]
    assert main([*command, str(config), *words]) == 2
    captured = capsys.readouterr()
    *notes, error = captured.err.splitlines()
    # How images are prepared is said before anything starts.
    assert all(note.startswith("extract: preprocessing: ") for note in notes), captured.err
    assert error.startswith("error: ")
    assert [name for name in named if name not in error] == [], captured.err
    assert not (config.parent / "run" / "store").exists()
    assert not (config.parent / "run" / "config.yaml").exists()
    # What is shown is shown all the same.
    assert command == ["run"] or command == ["extract"] or yaml.safe_load(captured.out)["run"]["seed"] == 0


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--interventions.layers", "['blocks.?']", "--modes.concepts", "{folder}/good.json"],
        ["--sae.groups.0.quantities", "[contribution-net]", "--interventions.quantities", "[contribution-net]",
         "--visualization.quantities", "[contribution-net]"],
        ["--attribution.further_targets", "[{name: class, options: {index: 9}}]", "--sae.groups.0.quantities",
         "['contribution*positive', activation-positive]", "--interventions.quantities",
         "['contribution[class_9]-positive']"],
    ],
    ids=["defaults", "globs and concepts", "both signs together", "a further target"],
)  # fmt: skip
def test_what_stages_take_passes_the_check(config: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("{folder}", str(config.parent)) for word in words]
    assert main(["config", "show", str(config), *words]) == 0, capsys.readouterr().err


def test_without_a_check_a_config_is_shown_where_its_data_are_not(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(config), "--data.shards", "/nowhere/shards"]
    assert main(["config", "show", "--no-check", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["shards"] == "/nowhere/shards"
    assert main(["config", "show", *words]) == 2
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["data"]["shards"] == "/nowhere/shards"
    assert "/nowhere/shards" in captured.err


def test_defaults_of_later_stages_do_not_stop_an_extraction_that_has_none_of_their_quantities(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: section for name, section in VALUES.items() if name != "sae"}
    path = config.parent / "extraction.yaml"
    path.write_text(yaml.safe_dump(values | {"attribution": {**VALUES["attribution"], "activations": False}}))
    assert main(["run", str(path)]) == 2
    assert "'activation-positive'" in capsys.readouterr().err
    # Ray is looked for only when all checks have passed.
    assert main(["extract", str(path), "--cluster.address", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
