"""All of it under Ray Train, and errors that a user can repair."""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from codec_dist.cluster_runtime import Session
from codec_dist.config import Choice, ClusterSection, SaeGroup, SaeSection, TrackingSection, TrainingSettings
from codec_dist.sae import SaeError, SparseAutoencoder
from codec_dist.training import TrainedSae, TrainingError, train_saes

Groups = Callable[..., tuple[SaeGroup, ...]]


def train(run: Path, groups: tuple[SaeGroup, ...], spread: str = "rows", **changes: object) -> list[TrainedSae]:
    cluster = ClusterSection(**changes)
    sae = SaeSection(groups=groups, evaluations=2, checkpoints=2, spread=spread)
    disabled = TrackingSection(mode="disabled")
    return train_saes(run / "store", run / "split.parquet", groups, sae, run, 7, cluster, disabled, name="test")


@pytest.mark.ray
def test_trains_all_saes_with_two_ranks_and_leaves_the_documented_files(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: object, capfd: pytest.CaptureFixture[str]
) -> None:
    run, groups = make_run(), make_groups(epochs=10)
    trained = train(run, groups)
    assert [(one.layer, one.architecture) for one in trained] == [
        ("blocks.0", "topk"),
        ("blocks.1", "topk"),
        ("blocks.1", "stsae"),
    ]
    assert "train: 30 of 30 SAE epochs" in capfd.readouterr().err
    for one in trained:
        metrics = json.loads((one.folder / "metrics.json").read_text())
        assert metrics["select"]["ev"] == one.ev_select
        assert metrics["evaluate"]["samples"] == 21
        assert metrics["select"]["modes_class_correlated"] <= metrics["select"]["modes_alive"]
        assert len((one.folder / "history.jsonl").read_text().splitlines()) == 2
        assert SparseAutoencoder.load(one.folder).channels == {"blocks.0": 8, "blocks.1": 12}[one.layer]
        assert not one.resumed
    assert trained[0].ev_evaluate > 0.3
    _check_selection(run, trained)
    _check_metrics_file(run)
    assert not (run / "sae/.train").exists()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("sae/**/*.safetensors")}
    again = train(run, groups)
    assert all(one.resumed for one in again)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("sae/**/*.safetensors")}


def _check_selection(run: Path, trained: list[TrainedSae]) -> None:
    selected = json.loads((run / "sae/selected.json").read_text())
    assert set(selected) == {"blocks.0", "blocks.1"}
    # By default the sparser of the two, unless it gives up more than a twentieth of the explained variance.
    measured = {one: json.loads((one.folder / "metrics.json").read_text())["select"] for one in trained[1:]}
    sparser, denser = sorted(measured, key=lambda one: measured[one]["l0"])
    best = sparser if sparser.ev_select >= 0.95 * denser.ev_select else denser
    assert run / "sae" / selected["blocks.1"]["contribution-positive"] == best.folder
    assert [one.selected for one in trained] == [True, best is trained[1], best is trained[2]]
    reasons = json.loads((run / "sae/selection.json").read_text())["choices"]
    assert ["of 2 configurations" in one["reason"] for one in reasons] == [False, True]


def _check_metrics_file(run: Path) -> None:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [entry["metrics"] for entry in entries if "metrics" in entry]
    assert sum("blocks.0/contribution-positive/topk/ev" in metrics for metrics in logged) == 2
    assert all(math.isfinite(value) for metrics in logged for value in metrics.values())
    histograms = {entry["histogram"]["name"] for entry in entries if "histogram" in entry}
    assert "blocks.1/contribution-positive/topk/top_correlation" in histograms
    tables = [entry["table"] for entry in entries if "table" in entry]
    assert {"layer", "mode", "class", "correlation"} <= set(tables[0]["columns"])
    assert tables[0]["rows"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "saes"])
def test_a_problem_inside_the_ranks_is_one_clear_line(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: object, spread: str
) -> None:
    """With whole SAEs the other rank has nothing to train, and waits."""
    run = make_run(layers={"blocks.1": 12})
    wild = make_groups()[0].model_copy(update={"training": TrainingSettings(epochs=2, learning_rate=1e38)})
    with pytest.raises(TrainingError, match="lower its learning_rate"):
        train(run, (wild,), spread)
    assert not (run / "sae/.train").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_that_dies_is_replaced_and_the_weights_are_the_same(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: object
) -> None:
    groups = make_groups(epochs=200)
    undisturbed, disturbed = make_run(name="undisturbed"), make_run(name="disturbed")
    killed: list[int] = []

    def kill_a_rank() -> None:
        while not any(disturbed.glob("sae/*/*/resume-*.safetensors")):
            time.sleep(0.01)
        killed.append(_pids_of_ranks()[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_a_rank, daemon=True)
    thread.start()
    trained = train(disturbed, groups)
    expected = train(undisturbed, groups)
    assert len(killed) == 1
    for one, other in zip(trained, expected, strict=True):
        found, wanted = (load_file(sae.folder / "model.safetensors") for sae in (one, other))
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


INTERRUPTED_RUN = """
import json, signal, sys
from pathlib import Path
from codec_dist.cluster_runtime import ray_session
from codec_dist.config import ClusterSection, SaeGroup, SaeSection, TrackingSection
from codec_dist.training import train_saes

run, cluster = Path(sys.argv[1]), ClusterSection(address=sys.argv[2])
groups = tuple(SaeGroup(**group) for group in json.loads(sys.argv[3]))
# The first resume state comes early, so that the training is far from its end when it is interrupted.
sae, disabled = SaeSection(groups=groups, evaluations=2, checkpoints=20), TrackingSection(mode="disabled")
with ray_session(cluster):
    try:
        train_saes(run / "store", run / "split.parquet", groups, sae, run, 7, cluster, disabled, name="test")
    except KeyboardInterrupt:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        sys.exit(130)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_training_says_so_and_is_resumed(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: Session
) -> None:
    run, groups = make_run(), make_groups(epochs=500)[:1]
    values = json.dumps([group.model_dump(mode="json") for group in groups])
    words = [sys.executable, "-c", INTERRUPTED_RUN, str(run), ray_cluster.address, values]
    with subprocess.Popen(words, start_new_session=True) as process:
        while not any(run.glob("sae/*/*/resume-*.safetensors")):
            assert process.poll() is None, "the training ended before it could be interrupted"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
    assert any(run.glob("sae/*/*/resume-*.safetensors"))
    assert not (run / "sae/selected.json").exists()
    assert not (run / "sae/.train").exists()
    before = signal.getsignal(signal.SIGINT)
    assert len(train(run, groups)) == 2
    assert signal.getsignal(signal.SIGINT) is before
    _check_metrics_file(run)  # no evaluation was done twice


def _pids_of_ranks() -> list[int]:
    """Those of this session's own cluster, whose raylet is a child of this process."""
    raylets = _children(os.getpid())
    workers = [worker for raylet in raylets for worker in _children(raylet)]
    return [pid for pid in workers if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.ray
def test_more_ranks_than_the_cluster_holds_are_refused(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: object
) -> None:
    with pytest.raises(TrainingError, match=r"99 ranks .* do not fit in a cluster with 4 CPUs"):
        train(make_run(), make_groups(), training_workers=99)


@pytest.mark.ray
def test_a_second_training_in_the_same_run_is_refused_and_harms_nothing(
    make_run: Callable[..., Path], make_groups: Groups, ray_cluster: object
) -> None:
    run = make_run()
    working = run / "sae/.train/0-progress.json"
    working.parent.mkdir(parents=True)
    working.write_text("{}")
    with open(run / "sae/.train.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="another training is at work in"):
            train(run, make_groups())
    assert working.exists()


def test_dividing_a_dictionary_over_ranks_that_do_not_meet_is_refused(
    make_run: Callable[..., Path], make_groups: Groups
) -> None:
    group = make_groups()[0]
    divided = group.model_copy(update={"training": group.training.model_copy(update={"divide": True})})
    with pytest.raises(TrainingError, match=r"training\.divide .* sae\.spread saes"):
        train(make_run(), (divided,), "saes")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": ("block.0",)}, TrainingError, r"sae.groups.layers: .*'block\.0'; did you mean blocks\.0"),
        ({"layers": ("head*",)}, TrainingError, r"'head\*'; known: blocks.0, blocks.1"),
        ({"quantities": ("gradient-*",)}, TrainingError, "sae.groups.quantities: .*'gradient-"),
        ({"architecture": Choice(name="topk", options={"k": 99})}, SaeError, "between 1 and the number of modes"),
        ({"architecture": Choice(name="tpk")}, SaeError, "did you mean topk"),
    ],
)
def test_what_does_not_exist_is_named(
    make_run: Callable[..., Path], change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(make_run(), (SaeGroup(**change),))


def test_a_missing_or_foreign_split_is_named(make_run: Callable[..., Path], make_groups: Groups) -> None:
    run = make_run()
    split = pq.read_table(run / "split.parquet")
    pq.write_table(split.slice(3), run / "split.parquet")
    with pytest.raises(TrainingError, match="lists 100 of the store's 103 samples"):
        train(run, make_groups())
    only_fit = split.set_column(2, "part", pa.array(["fit"] * len(split)))
    pq.write_table(only_fit, run / "split.parquet")
    with pytest.raises(TrainingError, match=r"the part 'select' .* none of the store's 103 samples"):
        train(run, make_groups())
    (run / "split.parquet").unlink()
    with pytest.raises(TrainingError, match="cannot read the split"):
        train(run, make_groups())
