"""The command line helps, takes overrides anywhere, and answers bad input with one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from codec_dist.cli import main
from codec_dist.cli.parser import STAGE_HELP, split_overrides

COMMANDS = [
    ["demo"],
    *([name] for name in STAGE_HELP),
    ["submit"],
    ["shards", "pack"],
    ["shards", "index"],
    ["store", "info"],
    ["store", "digest"],
    ["store", "verify"],
    ["store", "import"],
    ["store", "export"],
    ["config", "show"],
    ["config", "packaged"],
    ["config", "schema"],
    ["config", "keys"],
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    values = {"run": {"directory": "run"}, "data": {"shards": "shards"}, "model": {"spec": "torchvision:resnet18"}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: codec-dist" in capsys.readouterr().out


def test_help_is_quick_and_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, contextlib; from codec_dist.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert not {'torch', 'ray', 'zarr', 'wandb'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_overrides_may_stand_anywhere() -> None:
    words = ["extract", "--run.seed", "3", "config.yaml", "--cluster.actors=2", "--debug"]
    assert split_overrides(words) == (
        ["extract", "config.yaml", "--debug"],
        ["--run.seed", "3", "--cluster.actors=2"],
    )


def test_config_show_prints_defaults_and_overrides(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--no-check", str(config), "--attribution.method.options.steps", "20"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["attribution"]["method"] == {"name": "integrated_gradients", "options": {"steps": 20}}
    assert shown["data"]["split"]["fit"] == 0.6


def test_config_schema_is_a_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert "sae" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "nowhere.yaml"], "cannot read the config nowhere.yaml: No such file or directory"),
        (["extract", "{config}", "--attribution.metod.name", "x"], "unknown key `attribution.metod`: did you mean"),
        (
            ["extract", "{config}", "--attribution.method.name", "integrated_gradient"],
            "did you mean integrated_gradients",
        ),
        (["extract", "{config}"], "shards"),
        (["train", "{config}"], "`train` needs"),
        (["report", "{config}", "--run.directory", "{config}"], "is a file"),
        (["store", "info", "nowhere"], "there is no store at nowhere"),
        (["store", "digest", "{folder}"], "{folder}"),
        (["shards", "pack", "nowhere", "{folder}/new"], "nowhere"),
        (["shards", "index", "{folder}"], "{folder}"),
        (["shards", "index", "pipe:cat /etc/passwd"], "pipe"),
        (["shards", "pack", "digits", "{folder}/new", "--run.seed", "1"], "--run.seed is not an option here"),
        (["submit", "extract", "{config}", "--address", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"config": config, "folder": config.parent}
    assert main([word.format(**places) for word in words]) == 2
    captured = capsys.readouterr()
    assert message.format(**places) in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "words", [[], ["extrac"], ["extract"], ["submit", "dance", "c.yaml", "--address", "x"]], ids=str
)
def test_bad_commands_are_one_line_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_shows_where(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", str(config) + ".gone", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_packaged_configs_are_named_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "packaged"]) == 0
    assert "sweep" in capsys.readouterr().out.splitlines()
    assert main(["config", "packaged", "sweep"]) == 0
    (tmp_path / "sweep.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "show", str(tmp_path / "sweep.yaml"), "--no-check", "--run.seed", "3"]) == 0
    assert "threshold" in capsys.readouterr().out
    assert main(["config", "packaged", "swep"]) == 2
    assert "did you mean sweep" in capsys.readouterr().err
