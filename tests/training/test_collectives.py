"""What training promises about ranks, kills, streams and what else trains: the weights do not change."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from codec_dist.config import Choice, SaeGroup, TrainingSettings
from codec_dist.sae import SparseAutoencoder
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask
from codec_dist.training.saving import RESUME_FILES, find_sweeps
from codec_dist.training.training_log import training_log

sys.path.insert(0, str(Path(__file__).parent))

from ranks_main import interrupted_at

Groups = Callable[..., tuple[SaeGroup, ...]]
Tasks = dict[str, TrainingTask]
FAST = TrainingSettings(epochs=13, batch_size=16, learning_rate=0.02)
# Two stacks (per layer) of what couples the rows of a batch: the threshold, AuxK, dead windows.
BATCHTOPK = SaeGroup(
    architecture=Choice(name="batchtopk", options={"modes": 11, "dead_window": 90, "auxk": 3, "threshold_memory": 5}),
    grid={"k": (1, 3), "training.learning_rate": (0.02, 0.01)},
    quantities=("contribution-positive",),
    training=FAST,
)
# Everything that a resume state has to remember; one of the stacks of stsae ends before the other.
RESAMPLED = {"hidden": 8, "threshold": 0.5, "dropout": 0.2, "dead_window": 60, "resample_every": 130}
STACKS = (
    SaeGroup(
        architecture=Choice(name="stsae", options=RESAMPLED),
        grid={"l1": (0.001, 0.1), "training.epochs": (9, 13)},
        layers=("blocks.1",),
        quantities=("contribution-positive",),
        training=TrainingSettings(epochs=13, batch_size=16, learning_rate=0.01, schedule="plateau", patience=1),
    ),
    BATCHTOPK,
)


def start(
    tasks: Sequence[tuple[TrainingTask, int | None]], folder: Path, size: int = 1
) -> list[subprocess.Popen[bytes]]:
    path = folder / "tasks.pickle"
    path.write_bytes(pickle.dumps(tasks))
    script = Path(__file__).with_name("ranks_main.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [sys.executable, str(script), str(path), str(folder / "meeting-point")]
    return [subprocess.Popen([*words, str(rank), str(size)], env=environment) for rank in range(size)]


def weights(task: TrainingTask) -> dict[str, dict[str, torch.Tensor]]:
    return {job.label: load_file(task.folder(job) / "model.safetensors") for job in task.jobs}


def assert_same(found: TrainingTask, expected: TrainingTask, tolerance: float = 0.0) -> None:
    ours, theirs = weights(found), weights(expected)
    assert len(theirs) == len(expected.jobs)
    for label, tensors in theirs.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                ours[label][name],
                tensor,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=f"{label} {name}": f"{n}: {m}",
            )


def metrics(task: TrainingTask, part: str = "evaluate") -> list[dict[str, Any]]:
    return [json.loads((task.folder(job) / "metrics.json").read_text())[part] for job in task.jobs]


def history(task: TrainingTask, job: Any) -> list[dict[str, Any]]:
    lines = (task.folder(job) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as a rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    make_run_in: Callable[..., Path],
    make_groups: Groups,
    make_task: Callable[..., TrainingTask],
) -> Tasks:
    """Several trainings by one pair of ranks."""
    folder = tmp_path_factory.mktemp("two-ranks")
    exact = (*make_groups(epochs=13, dropout=0), BATCHTOPK)
    one_layer = tuple(group.model_copy(update={"layers": ("blocks.1",)}) for group in exact)
    divided = tuple(
        group.model_copy(update={"training": group.training.model_copy(update={"divide": True})}) for group in one_layer
    )
    double = {"dtype": "float64"}
    often = {"checkpoints": 12}

    def make(name: str, groups: tuple[SaeGroup, ...], dtype: str = "float32", **changes: Any) -> TrainingTask:
        return make_task(make_run_in(folder, dtype=dtype, name=name), groups, dtype=dtype, **changes)

    tasks = {
        "rows": make("rows", exact, **double),
        "saes": make("groups", exact, spread=True, **double),
        "divided": make("divided", divided, **double, **often),
        "straight": make("straight", STACKS),
        "interrupted": make("interrupted", STACKS, **often),
        "interrupted groups": make("interrupted-groups", STACKS, spread=True, **often),
    }
    random = Random(time.time_ns())
    steps = {name: random.randint(6, 34) for name in ("divided", "interrupted", "interrupted groups")}
    print(f"interrupted at {steps}")  # noqa: T201 -- shown where a test fails
    ranks = start([(task, steps.get(name)) for name, task in tasks.items()], folder, size=2)
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    return tasks


@pytest.fixture(scope="module")
def exact(
    tmp_path_factory: pytest.TempPathFactory,
    make_run_in: Callable[..., Path],
    make_groups: Groups,
    make_task: Callable[..., TrainingTask],
) -> TrainingTask:
    """By one rank, in float64."""
    folder = tmp_path_factory.mktemp("exact")
    groups = (*make_groups(epochs=13, dropout=0), BATCHTOPK)
    return by_one_rank(make_task(make_run_in(folder, dtype="float64"), groups, dtype="float64"))


@pytest.fixture(scope="module")
def stacks(
    tmp_path_factory: pytest.TempPathFactory,
    make_run_in: Callable[..., Path],
    make_task: Callable[..., TrainingTask],
) -> TrainingTask:
    """By one rank, in float32, without an interruption."""
    return by_one_rank(make_task(make_run_in(tmp_path_factory.mktemp("stacks")), STACKS))


def by_one_rank(task: TrainingTask) -> TrainingTask:
    (rank,) = start([(task, None)], task.directory)
    assert rank.wait(timeout=500) == 0
    return task


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "saes"])
def test_two_ranks_give_the_result_of_one(spread: str, two_ranks: Tasks, exact: TrainingTask) -> None:
    """52 steps; with the threshold of BatchTopK, AuxK and dead windows of global batches."""
    together, alone = two_ranks[spread], exact
    assert_same(together, alone, tolerance=1e-6)
    assert all("threshold_sums" in tensors for label, tensors in weights(alone).items() if "batchtopk" in label)
    for found, expected in zip(metrics(together), metrics(alone), strict=True):
        assert found["frequency"] == expected["frequency"]
        assert found["ev"] == pytest.approx(expected["ev"], abs=1e-6)
        assert found["modes_class_correlated"] == expected["modes_class_correlated"]


@pytest.mark.slow
def test_a_divided_dictionary_gives_the_result_of_one_device_and_is_saved_whole(
    two_ranks: Tasks, exact: TrainingTask
) -> None:
    """Although it was interrupted and resumed."""
    divided, alone = two_ranks["divided"], exact
    expected = {label: tensors for label, tensors in weights(alone).items() if label.startswith("blocks.1")}
    assert len(expected) == 6
    assert weights(divided).keys() == expected.keys()
    for label, tensors in weights(divided).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[label][name], rtol=1e-6, atol=1e-6)
    for job in divided.jobs:
        assert SparseAutoencoder.load(divided.folder(job)).dictionary.shape[0] in (10, 11, 36)


@pytest.mark.slow
def test_what_two_ranks_train_is_resumed_bit_by_bit(two_ranks: Tasks) -> None:
    assert_same(two_ranks["interrupted"], two_ranks["straight"])
    for one, other in zip(two_ranks["interrupted"].jobs, two_ranks["straight"].jobs, strict=True):
        assert history(two_ranks["interrupted"], one)[-1]["ev"] == history(two_ranks["straight"], other)[-1]["ev"]


@pytest.mark.slow
def test_groups_of_two_ranks_are_resumed_bit_by_bit(two_ranks: Tasks, stacks: TrainingTask) -> None:
    assert_same(two_ranks["interrupted groups"], stacks)
    with training_log(two_ranks["saes"]):
        pass  # what the ranks have left is logged at its end
    assert not list(two_ranks["saes"].scratch.glob("rank-log-*"))
    entries = [
        json.loads(line)["metrics"]
        for line in (two_ranks["saes"].directory / "metrics.jsonl").read_text().splitlines()
        if "metrics" in json.loads(line)
    ]
    for job in two_ranks["saes"].jobs:  # also those that rank 1 has trained
        assert sum(f"{job.label}/ev" in entry for entry in entries) == 2, job.label


@pytest.mark.usefixtures("one_thread")
def test_a_training_interrupted_twice_continues_bit_by_bit(
    make_run: Callable[..., Path], make_task: Callable[..., TrainingTask], stacks: TrainingTask
) -> None:
    task = make_task(make_run(name="interrupted"), STACKS, checkpoints=12)
    random = Random(time.time_ns())
    for step in (random.randint(5, 25), random.randint(5, 20)):
        with interrupted_at(step):
            train_on_rank(task, Ranks())
        assert list((task.directory / "sae").glob(f"*/*/{RESUME_FILES}")), f"interrupted at step {step}"
    train_on_rank(task, Ranks())
    assert_same(task, stacks)
    for one, other in zip(task.jobs, stacks.jobs, strict=True):
        found, expected = history(task, one), history(stacks, other)
        assert [entry["epoch"] for entry in found] == [entry["epoch"] for entry in expected]
        for name in ("ev", "l0", "learning_rate"):
            assert found[-1][name] == expected[-1][name]
        assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-6)
    assert not list((task.directory / "sae").glob(f"*/*/{RESUME_FILES}"))


def test_a_killed_training_continues_bit_by_bit(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask], one_thread: None
) -> None:
    whole = make_task(make_run(name="whole"), make_groups(epochs=20))
    killed = make_task(make_run(name="killed"), make_groups(epochs=20), checkpoints=19)
    (process,) = start([(killed, None)], killed.directory)
    while not list((killed.directory / "sae").glob(f"*/*/{RESUME_FILES}")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = [state for folder in (killed.directory / "sae").glob("*/*") for state in find_sweeps(folder)]
    assert any(0 < state.epoch < 20 for state in saved)
    train_on_rank(killed, Ranks())
    train_on_rank(whole, Ranks())
    assert_same(killed, whole)


@pytest.mark.usefixtures("one_thread")
def test_streamed_rows_are_resumed_bit_by_bit_even_where_they_would_fit_by_then(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    streamed = {"bytes_for_rows": 0, "window_bytes": 1000}
    straight = make_task(make_run(name="straight"), make_groups(), **streamed)
    task = make_task(make_run(name="interrupted"), make_groups(), checkpoints=5, **streamed)
    train_on_rank(straight, Ranks())
    with interrupted_at(Random(time.time_ns()).randint(5, 20)):
        train_on_rank(task, Ranks())
    train_on_rank(replace(task, bytes_for_rows=None), Ranks())
    assert_same(task, straight)


def test_rows_that_were_in_memory_are_not_streamed_when_training_is_resumed(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    task = make_task(make_run(), make_groups(), checkpoints=5)
    with interrupted_at(Random(time.time_ns()).randint(1, 20)):
        train_on_rank(task, Ranks())
    with pytest.raises(
        TrainingError, match=r"in memory when training began, [\d,]+ bytes, and now there is room for 0 on"
    ):
        train_on_rank(replace(task, bytes_for_rows=0), Ranks())
    train_on_rank(task, Ranks())


def states(task: TrainingTask) -> list[Path]:
    return sorted((task.directory / "sae").glob(f"*/*/{RESUME_FILES}"))


@pytest.mark.usefixtures("one_thread")
def test_another_config_leaves_resume_states_alone(
    make_run: Callable[..., Path], make_task: Callable[..., TrainingTask], stacks: TrainingTask
) -> None:
    task = make_task(make_run(name="interrupted"), STACKS, checkpoints=12)
    with interrupted_at(20):
        train_on_rank(task, Ranks())
    before = {path: path.read_bytes() for path in states(task)}
    assert before
    # One of the SAEs that were interrupted, and one that is new.
    l1, _ = STACKS[0].grid["l1"]
    fewer = STACKS[0].model_copy(update={"grid": {"l1": (l1, 0.5), "training.epochs": (9,)}})
    train_on_rank(make_task(task.directory, (fewer,), checkpoints=12), Ranks())
    assert {path: path.read_bytes() for path in states(task)} == before
    train_on_rank(task, Ranks())
    assert_same(task, stacks)
    assert not states(task)


@pytest.mark.parametrize("damage", ["removed", "cut short"])
def test_an_sae_whose_weights_are_lost_is_trained_again(
    damage: str, make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    task = make_task(make_run(), make_groups())
    train_on_rank(task, Ranks())
    # Copies: what is loaded may be the file's own pages.
    before = {name: tensor.clone() for name, tensor in weights(task)[task.jobs[0].label].items()}
    path = task.folder(task.jobs[0]) / "model.safetensors"
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    train_on_rank(task, Ranks())
    for name, tensor in weights(task)[task.jobs[0].label].items():
        torch.testing.assert_close(tensor, before[name])


def test_a_damaged_resume_state_starts_these_saes_anew(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    whole, damaged = (make_task(make_run(name=name), make_groups()) for name in ("whole", "damaged"))
    folder = damaged.directory / "sae" / damaged.jobs[0].rows_folder
    folder.mkdir(parents=True)
    (folder / RESUME_FILES.replace("*", "0")).write_bytes(b"not a state")
    train_on_rank(whole, Ranks())
    train_on_rank(damaged, Ranks())
    assert_same(damaged, whole)


def test_weights_do_not_depend_on_what_else_is_trained(
    make_run: Callable[..., Path], make_groups: Groups, make_task: Callable[..., TrainingTask]
) -> None:
    both = ("contribution-positive", "activation-positive")
    many = make_task(make_run(name="many"), make_groups(quantities=both))
    few = make_task(make_run(name="few"), make_groups(quantities=both[1:]))
    small_memory = replace(few, directory=few.directory / "small", bytes_for_rows=10_000)
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
    for found, expected in zip(metrics(streamed, "select"), metrics(resident, "select"), strict=True):
        assert found["samples"] == expected["samples"]
        assert found["ev"] == pytest.approx(expected["ev"], abs=0.1)
    for job in resident.jobs:
        assert SparseAutoencoder.load(streamed.folder(job)).scale == SparseAutoencoder.load(resident.folder(job)).scale
