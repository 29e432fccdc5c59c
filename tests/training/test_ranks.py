"""What training promises about ranks, kills, streams and what else trains: the weights do not change."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codec_dist.config import SaeGroup
from codec_dist.sae import SparseAutoencoder
from codec_dist.training.rank import train_on_rank
from codec_dist.training.ranks import Ranks
from codec_dist.training.resume import FILE, load_resume_state
from codec_dist.training.task import TrainingTask

RANK = """
import pickle, sys
from pathlib import Path
import torch, torch.distributed as dist
from codec_dist.training.rank import train_on_rank
from codec_dist.training.ranks import Ranks
task, meeting_point, rank, size = sys.argv[1:]
torch.set_num_threads(1)
if int(size) > 1:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=int(rank), world_size=int(size))
train_on_rank(pickle.loads(Path(task).read_bytes()), Ranks())
"""

Groups = Callable[..., tuple[SaeGroup, ...]]


def start(task: TrainingTask, rank: int = 0, size: int = 1) -> subprocess.Popen[bytes]:
    path = task.directory / f"task-{size}.pickle"
    path.write_bytes(pickle.dumps(task))
    command = [sys.executable, "-c", RANK, str(path), str(task.directory / "meeting-point"), str(rank), str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2])


def weights(task: TrainingTask) -> dict[str, dict[str, torch.Tensor]]:
    return {job.label: load_file(task.folder(job) / "model.safetensors") for job in task.jobs}


def assert_same(found: TrainingTask, expected: TrainingTask, tolerance: float = 0.0) -> None:
    for label, tensors in weights(expected).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                weights(found)[label][name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_two_ranks_give_the_result_of_one(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    alone, together = (
        make_task(make_run(dtype="float64", name=name), make_groups(dropout=0), dtype="float64")
        for name in ("alone", "together")
    )
    ranks = [start(together, rank, 2) for rank in range(2)]
    train_on_rank(alone, Ranks())
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert_same(together, alone, tolerance=1e-6)
    for job in alone.jobs:
        found, expected = (
            json.loads((task.folder(job) / "metrics.json").read_text())["evaluate"] for task in (together, alone)
        )
        assert found["frequency"] == expected["frequency"]
        assert found["ev"] == pytest.approx(expected["ev"], abs=1e-6)
        assert found["modes_class_correlated"] == expected["modes_class_correlated"]


def test_a_killed_training_continues_bit_by_bit(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    threads = torch.get_num_threads()
    whole = make_task(make_run(name="whole"), make_groups(epochs=40))
    killed = make_task(make_run(name="killed"), make_groups(epochs=40), checkpoints=39)
    process = start(killed)
    saved = [killed.folder(job) / FILE for job in killed.jobs]
    while not any(path.exists() for path in saved):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = [load_resume_state(killed.folder(job)) for job in killed.jobs]
    assert any(state is not None and 0 < state.epoch < 40 for state in states)
    torch.set_num_threads(1)
    try:
        train_on_rank(killed, Ranks())
        train_on_rank(whole, Ranks())
    finally:
        torch.set_num_threads(threads)
    assert_same(killed, whole)
    for job in whole.jobs:
        histories = [
            [
                json.loads(line) | {"seconds": 0}
                for line in (task.folder(job) / "history.jsonl").read_text().splitlines()
            ]
            for task in (killed, whole)
        ]
        assert [entry["epoch"] for entry in histories[0]] == [20, 40]
        assert not (killed.folder(job) / FILE).exists()
        for name in ("ev", "l0", "learning_rate"):
            assert histories[0][-1][name] == histories[1][-1][name]


def test_a_damaged_resume_state_starts_that_sae_anew(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    whole, damaged = (make_task(make_run(name=name), make_groups()) for name in ("whole", "damaged"))
    folder = damaged.folder(damaged.jobs[0])
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(b"not a state")
    train_on_rank(whole, Ranks())
    train_on_rank(damaged, Ranks())
    assert_same(damaged, whole)


def test_weights_do_not_depend_on_what_else_is_trained(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    both = ("contribution-positive", "activation-positive")
    many = make_task(make_run(name="many"), make_groups(quantities=both))
    few = make_task(make_run(name="few"), make_groups(quantities=both[1:]))
    small_memory = replace(few, directory=few.directory / "small", bytes_for_rows=6000)
    train_on_rank(many, Ranks())
    train_on_rank(few, Ranks())
    train_on_rank(small_memory, Ranks())
    for one in (few, small_memory):
        for label, tensors in weights(one).items():
            assert all(torch.equal(tensor, weights(many)[label][name]) for name, tensor in tensors.items())


def test_streamed_rows_train_as_well_as_resident_ones(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    groups = make_groups(epochs=40)[:1]
    resident = make_task(make_run(name="resident"), groups)
    streamed = make_task(make_run(name="streamed"), groups, bytes_for_rows=0, window_bytes=1000)
    for task in (resident, streamed):
        train_on_rank(task, Ranks())
    for job in resident.jobs:
        found, expected = (
            json.loads((task.folder(job) / "metrics.json").read_text())["select"] for task in (streamed, resident)
        )
        assert found["samples"] == expected["samples"]
        assert found["ev"] == pytest.approx(expected["ev"], abs=0.1)
        assert SparseAutoencoder.load(streamed.folder(job)).scale == SparseAutoencoder.load(resident.folder(job)).scale
