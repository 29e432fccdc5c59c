"""One clear line for what a user can repair: stores, rows, checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.config import Choice, ClusterSection, SaeGroup, SaeSection, TrackingSection, TrainingSettings
from codec_dist.sae import build
from codec_dist.store import StoreError
from codec_dist.training import TrainedSae, TrainingError, train_saes
from codec_dist.training.collectives import Ranks
from codec_dist.training.optimizer import Lockstep
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask
from codec_dist.training.saving import RESUME_FILES, ResumeState, save_sweep
from codec_dist.training.schedules import EarlyStop, Plateau

Run, Task = Callable[..., Path], Callable[..., TrainingTask]
GROUP = SaeGroup(
    architecture=Choice(name="topk", options={"modes": 10, "k": 2}),
    layers=("blocks.1",),
    quantities=("contribution-positive",),
    training=TrainingSettings(epochs=2, batch_size=16),
)


def train(run: Path, *groups: SaeGroup) -> list[TrainedSae]:
    disabled = TrackingSection(mode="disabled")
    return train_saes(run / "store", run / "split.parquet", groups, SaeSection(), run, 7, ClusterSection(), disabled)


def test_a_store_with_missing_shards_is_refused(make_run: Run) -> None:
    run = make_run()
    sorted((run / "store/ledger").glob("*.json"))[1].unlink()
    with pytest.raises(TrainingError, match=r"holds 2 of 3 shards \(not shard-000001\): run `codec-dist extract`"):
        train(run, GROUP)


def test_a_lost_chunk_is_named(make_run: Run, make_task: Task) -> None:
    run = make_run()
    task = make_task(run, (GROUP,))
    next((run / "store/arrays.zarr").glob("layers/blocks.1/contribution/*/positive/c.1.0")).unlink()
    with pytest.raises(StoreError, match=r"blocks\.1.*contribution"):
        train_on_rank(task, Ranks())


def test_rows_that_are_not_finite_are_named(make_run: Run, make_task: Task) -> None:
    """NaNs a store does not take; what overflows in the type of the training is found here."""
    task = make_task(make_run(dtype="float64", value_scale=1e39), (GROUP,))
    with pytest.raises(TrainingError, match=r"blocks\.1, contribution-positive: .*sample .* holds inf in channel"):
        train_on_rank(task, Ranks())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "relu", "'relu' and 12 channels instead of 'topk' and 12"),
        ("channels", 8, "'topk' and 8 channels instead of 'topk' and 12"),
    ],
)
def test_a_folder_with_another_sae_is_refused(
    make_run: Run, make_task: Task, field: str, value: object, message: str
) -> None:
    run = make_run()
    task = make_task(run, (GROUP,))
    train_on_rank(task, Ranks())
    path = task.folder(task.jobs[0]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(TrainingError, match=message):
        train(run, GROUP)


@pytest.mark.parametrize(("architecture", "channels"), [("gated", 12), ("topk", 8)])
def test_a_resume_state_of_another_sae_is_refused(
    make_run: Run, make_task: Task, architecture: str, channels: int
) -> None:
    task = make_task(make_run(), (GROUP,))
    job = task.jobs[0]
    other = build(architecture, {"modes": 10}, channels)
    adam = Lockstep([other], [0.1], Ranks()).states()[0]  # type: ignore[list-item]
    state = ResumeState(1.0, other.state_dict(), adam, Plateau(1), EarlyStop(None), 0.0, 0, [], 0.0)
    save_sweep(task.directory / "sae" / job.rows_folder / RESUME_FILES.replace("*", "0"), 1, {job.identity: state})
    with pytest.raises(TrainingError, match=r"holds no topk of 12 channels and 10 modes: remove .*resume-0"):
        train_on_rank(task, Ranks())


def test_an_option_that_a_layer_is_too_narrow_for_names_the_layer(make_run: Run) -> None:
    pca = GROUP.model_copy(update={"architecture": Choice(name="pca", options={"modes": 9}), "layers": ("*",)})
    with pytest.raises(Exception, match=r"blocks\.0 \(8 channels\): .*at most 8 components"):
        train(make_run(), pca)
