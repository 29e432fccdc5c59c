"""The demo as a person runs it: one command, real digits, a report; killed anywhere, it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.sae_remedies import compare
from codec_dist.config import load_config
from codec_dist.store import ContributionStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LAYERS = [f"blocks.{index}" for index in range(6)]
COMMAND = [sys.executable, "-m", "codec_dist", "demo", "--out"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished demo."""
    folder = tmp_path_factory.mktemp("demo")
    finished = subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, check=False, timeout=1500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert str(folder / "report" / "index.html") in finished.stdout
    return folder


def test_classifier_reads_97_percent_of_unseen_digits(demo: Path) -> None:
    assert json.loads((demo / "model" / "classifier.json").read_text())["accuracy"] >= 0.97


def test_contributions_are_sparser_than_activations_in_every_layer(demo: Path) -> None:
    rows = pq.read_table(demo / "modes" / "statistics.parquet").to_pylist()
    hoyer = {(row["layer"], row["quantity"]): row["hoyer_mean"] for row in rows}
    for layer in LAYERS:
        assert hoyer[layer, "contribution"] > hoyer[layer, "activation"], layer


def test_the_last_layers_sae_explains_held_out_contributions(demo: Path) -> None:
    selected = json.loads((demo / "sae" / "selected.json").read_text())
    metrics = json.loads((demo / "sae" / selected["blocks.5"]["contribution-positive"] / "metrics.json").read_text())
    assert metrics["evaluate"]["ev"] >= 0.7


def test_remedies_keep_the_modes_of_stsae_on_activations_alive(demo: Path) -> None:
    bare, remedied = compare(
        load_config(demo / "config.yaml"),
        ["blocks.3"],
        ["narrow and fast", "… initial_l0, resampling"],
        "activation-positive",
    )
    assert remedied.ev >= 0.6
    assert remedied.ev >= bare.ev + 0.2
    assert remedied.alive >= 2 * bare.alive


def test_ablating_a_classs_channels_hurts_it_more_than_random_ones_do(demo: Path) -> None:
    rows = pq.read_table(demo / "interventions" / "nulls.parquet").to_pylist()
    found = {
        row["layer"]: row
        for row in rows
        if (row["statistic"], row["ranking"], row["kind"]) == ("relative_auc", "contribution-positive", "ablate")
    }
    assert set(found) == set(LAYERS)
    assert {row["draws"] for row in found.values()} == {20}
    # A permutation of its own for each class and draw: the control varies.
    assert all(row["standard_deviation"] > 0.01 for row in found.values())
    selective = [layer for layer, row in found.items() if row["observed"] < row["low"]]
    assert len(selective) >= len(LAYERS) / 2, found


def test_completeness_residual_is_small_and_recorded(demo: Path) -> None:
    samples = ContributionStore(demo / "store").samples
    change = np.abs(samples["target_value"].to_numpy() - samples["baseline_value"].to_numpy())
    for layer in LAYERS:
        residual = np.abs(samples[f"completeness.{layer}"].to_numpy())
        assert np.median(residual / change) < 0.1, layer


def test_running_it_again_does_nothing(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    again = subprocess.run([*COMMAND, str(demo)], capture_output=True, text=True, check=True, timeout=120)
    after = {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()}
    assert again.stderr.count("done already") == 7
    assert after == before


def test_the_config_it_leaves_works_with_every_other_command(demo: Path) -> None:
    words = [sys.executable, "-m", "codec_dist", "store", "digest", str(demo)]
    digest = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert digest == ContributionStore(demo / "store").digest()
    words = [sys.executable, "-m", "codec_dist", "run", str(demo / "config.yaml")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stderr.count("done already") == 7


# What comes after the store, in less time.
SHORTER = [
    *("--sae.groups.0.training.epochs", "40", "--sae.groups.1.training.epochs", "20"),
    *("--interventions.images_per_class", "3", "--interventions.random_draws", "2"),
]


def kill_at(folder: Path, moment: str) -> None:
    """Run the demo and kill it, and all that it started, once it prints a line that begins with ``moment``."""
    words = [*COMMAND, str(folder), *SHORTER]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith(moment):
                return
        raise AssertionError(f"the demo ended before {moment!r}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_killed_at_any_stage_it_completes_with_the_same_store(demo: Path, folder: Path) -> None:
    for moment in ("prepare: done", "extract: ", "extract: done", "train: ", "train: done", "summarize: done"):
        kill_at(folder, moment)
    words = [*COMMAND, str(folder), *SHORTER]
    finished = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1500)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert ContributionStore(folder / "store").digest() == ContributionStore(demo / "store").digest()
