"""SIGTERM ends a command as Ctrl-C does: one line, everything in order, and a second one changes nothing."""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from digits_config import digits_values
from wandb_files import offline_files, records

from codec_dist.cli import main
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore, Ledger
from codec_dist.tracking import read_metrics

LINES = {signal.SIGTERM: "ended by SIGTERM: ", signal.SIGINT: "interrupted: "}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # 128 + the number of the signal, as shells have it


def interrupt(words: Sequence[str], at: str, signals: Sequence[signal.Signals]) -> tuple[int, list[str]]:
    """Exit code and lines of a command that gets the signals, one right after the other, when a line matches ``at``."""
    command = [sys.executable, "-m", "codec_dist", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if re.match(at, line) and signals:
                for each in signals:
                    process.send_signal(each)
                signals = ()
        code = process.wait(timeout=60)
    return code, lines


@pytest.mark.parametrize("number", LINES)
def test_a_command_ends_with_one_line_and_the_code_of_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    words = ["shards", "pack", "shapes", str(tmp_path / "shards"), "--count", "1000000"]
    code, lines = interrupt(words, "pack: ", [number])
    assert code == CODES[number]
    *progress, last = lines
    assert last.startswith(LINES[number])
    assert all(line.startswith("pack: ") for line in progress)


@pytest.mark.ray
@pytest.mark.slow
def test_an_extraction_is_left_in_order_and_goes_on(tmp_path: Path) -> None:
    samples, classes = digits()
    pack(samples, tmp_path / "shards", samples_per_shard=10, classes=classes)
    changes = {
        "run": {"directory": "run"},
        "data": {"shards": "shards", "limit": 900},
        "attribution": {"method": {"name": "integrated_gradients", "options": {"steps": 40, "points": "uniform"}}},
        "cluster": {"actors": 1},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(digits_values(changes)))
    run = tmp_path / "run"
    code, lines = interrupt(["extract", str(config)], r"extract: \d+ of 900 images", [signal.SIGTERM, signal.SIGTERM])
    assert code == 143, lines
    assert lines[-1].startswith("ended by SIGTERM: ")
    assert all(line.startswith(("prepare: ", "extract: ")) for line in lines[:-1]), lines
    assert list(read_metrics(run / "metrics.jsonl"))[-1]["event"] == "interrupted"
    (file,) = offline_files(run)
    assert list(records(file))[-1].exit.exit_code == 255
    # No process of the session is left, and the store is a part of the whole one.
    left = subprocess.run(["pgrep", "-f", str(config)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    done = Ledger(run / "store").done()
    assert 0 < len(done) < 90
    assert not ContributionStore(run / "store").complete


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_is_left_in_order_and_goes_on(tmp_path: Path, ray_cluster: object) -> None:
    samples, classes = digits()
    pack(itertools.islice(samples, 200), tmp_path / "shards", samples_per_shard=100, classes=classes)
    group = {
        "architecture": {"name": "topk", "options": {"modes": 16, "k": 2}},
        "quantities": ["contribution-positive"],
        "training": {"epochs": 4_000, "batch_size": 128},
    }
    changes = {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "attribution": {"layers": ["blocks.5"]},
        "sae": {
            "groups": [group],
            "evaluations": 24,
            "checkpoints": 24,
        },
        "cluster": {"training_workers": 2},
    }
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(digits_values(changes)))
    assert main(["extract", str(config)]) == 0
    before = set(offline_files(run))
    code, lines = interrupt(["train", str(config)], r"train: \d+,\d+ of 4,000", [signal.SIGTERM, signal.SIGTERM])
    assert code == 143, lines
    assert lines[-1].startswith("ended by SIGTERM: ")
    assert all(line.startswith("train: ") for line in lines[:-1]), lines
    *_, last = read_metrics(run / "metrics.jsonl")
    assert (last["stage"], last["event"]) == ("train", "interrupted")
    (file,) = set(offline_files(run)) - before
    assert list(records(file))[-1].exit.exit_code == 255
    left = subprocess.run(["pgrep", "-f", str(config)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert not (run / "sae" / ".train").exists()
    assert list(run.glob("sae/*/*/resume-*.safetensors"))
    assert not list(run.glob("sae/*/*/*/model.safetensors"))

    # The same command goes on: no evaluation is missing, and none was done twice.
    assert main(["train", str(config)]) == 0
    (folder,) = (path.parent for path in run.glob("sae/*/*/*/model.safetensors"))
    epochs = [json.loads(line)["epoch"] for line in (folder / "history.jsonl").read_text().splitlines()]
    logged = [
        entry["step"]
        for entry in read_metrics(run / "metrics.jsonl")
        if any(name.endswith("/ev") for name in entry.get("metrics", {}))
    ]
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == 4_000
    assert set(logged) == set(epochs)
