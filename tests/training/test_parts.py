"""Schedules, plans, bundles and rows: the parts of training, one by one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from codec_dist.config import Choice, SaeGroup, TrainingSettings
from codec_dist.store import ContributionStore
from codec_dist.training.bundle_training import spread_over
from codec_dist.training.bundles import make_bundles
from codec_dist.training.errors import TrainingError
from codec_dist.training.parts import read_parts
from codec_dist.training.plan import SaeJob, plan_jobs
from codec_dist.training.rank import train_on_rank
from codec_dist.training.ranks import Ranks
from codec_dist.training.rows import LayerRows
from codec_dist.training.schedules import Plateau, rate_factor
from codec_dist.training.task import TrainingTask


def layer_rows(run: Path, quantity: str = "contribution-positive", **changes: object) -> LayerRows:
    store = ContributionStore(run / "store")
    parts = read_parts(store, run / "split.parquet")
    return LayerRows(store, "blocks.0", quantity, parts, Ranks(), **changes)


def test_cosine_falls_from_the_rate_to_zero() -> None:
    factors = [rate_factor("cosine", progress) for progress in (0, 0.5, 1)]
    assert factors == pytest.approx([1, 0.5, 0])
    assert rate_factor("constant", 0.7) == rate_factor("plateau", 0.7) == 1


def test_plateau_halves_as_pytorch_does() -> None:
    losses = [*np.exp(-np.arange(5.0)), *([0.02] * 14), 0.01, *([0.0099999] * 9)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    plateau = Plateau(patience=3)
    for loss in losses:
        oracle.step(loss)
        plateau.update(loss)
        assert plateau.factor == optimizer.param_groups[0]["lr"]
    assert plateau.factor < 0.2


def test_occasions_are_spread_evenly_and_end_with_the_last_epoch() -> None:
    assert spread_over(150, 10) == set(range(15, 151, 15))
    assert spread_over(3, 10) == {1, 2, 3}
    assert spread_over(7, 2) == {4, 7}


def test_plan_names_each_sae_once_and_by_all_that_its_weights_depend_on(make_run: Callable[..., Path]) -> None:
    store = ContributionStore(make_run() / "store")
    group = SaeGroup(layers=("blocks.*",), quantities=("contribution-*", "activation-positive", "contribution-net"))
    jobs = plan_jobs(store, (group, group), "split", 0)
    assert [job.key for job in jobs] == [
        (layer, quantity)
        for layer in ("blocks.0", "blocks.1")
        for quantity in (
            "contribution-positive",
            "contribution-negative",
            "activation-positive",
            "contribution-net",
        )
    ]
    (first, *_) = jobs
    assert str(first.folder) == f"blocks.0/contribution-positive/{first.digest[:12]}-s0"
    slower = group.model_copy(update={"training": TrainingSettings(learning_rate=1e-4)})
    others = [plan_jobs(store, (slower,), "split", 0)[0], plan_jobs(store, (group,), "other split", 0)[0]]
    digests = {job.digest for job in [*jobs, *others]}
    assert len(digests) == len(jobs) + 2


def test_bundles_hold_equal_settings_and_fit_in_memory(
    make_run: Callable[..., Path],
    make_groups: Callable[..., tuple[SaeGroup, ...]],
    make_task: Callable[..., TrainingTask],
) -> None:
    groups = make_groups(quantities=("contribution-positive", "activation-positive"))
    jobs: tuple[SaeJob, ...] = make_task(make_run(), groups).jobs
    sizes = {job.key: 10 * job.channels for job in jobs}  # 80, 80, 120, 120
    epochs = [0, 0, 3, 0, 0, 0]
    bundles = make_bundles(jobs, epochs, sizes, 250)
    assert sorted(job.label for bundle in bundles for job in bundle.jobs) == sorted(job.label for job in jobs)
    for bundle in bundles:
        assert bundle.resident
        assert len({job.settings for job in bundle.jobs}) == 1
        assert {epochs[jobs.index(job)] for job in bundle.jobs} == {bundle.first_epoch}
        assert sum(sizes[key] for key in bundle.keys) <= 250
    assert len(bundles) == 4
    alone = make_bundles(jobs, epochs, sizes, 100)
    assert [bundle.resident for bundle in alone].count(False) == 4
    assert all(len(bundle.jobs) == 1 for bundle in alone if not bundle.resident)


@pytest.mark.parametrize("window_bytes", [1, 500, 1 << 20])
def test_streamed_windows_hold_every_fit_row_once_in_a_new_order_each_epoch(
    make_run: Callable[..., Path], window_bytes: int
) -> None:
    run = make_run(shard_sizes=(30, 30, 30, 13))
    resident, streamed = layer_rows(run), layer_rows(run, window_bytes=window_bytes)
    resident.load()
    (everything,) = resident.windows(0, 0)
    parts = read_parts(ContributionStore(run / "store"), run / "split.parquet")
    assert len(everything) == resident.fit_rows == len(parts.indices["fit"]) == 61
    epochs = [torch.cat(list(streamed.windows(5, epoch))) for epoch in range(4)]
    for rows in epochs:
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, everything.tolist()))
    assert len({tuple(rows[:, 0].tolist()) for rows in epochs}) > 1
    again = torch.cat(list(streamed.windows(5, 0)))
    assert torch.equal(again, epochs[0])


def test_calibration_and_held_out_rows_are_the_same_resident_or_streamed(make_run: Callable[..., Path]) -> None:
    run = make_run()
    resident, streamed = layer_rows(run), layer_rows(run)
    resident.load()
    assert resident.calibration().scale == streamed.calibration().scale
    assert torch.equal(resident.calibration().rows, streamed.calibration().rows)
    (everything,) = resident.windows(0, 0)
    assert resident.calibration().scale == pytest.approx(everything.double().std(correction=0).item(), rel=1e-12)
    store = ContributionStore(run / "store")
    indices = read_parts(store, run / "split.parquet").indices["select"]
    expected = store.read("blocks.0", "contribution-positive", indices)
    labels = store.samples["label"].to_numpy()[indices]
    for rows in (resident, streamed):
        values, found = (torch.cat(pieces) for pieces in zip(*rows.held_out("select"), strict=True))
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(found, labels)


def test_values_beyond_the_type_of_training_are_named(make_run: Callable[..., Path]) -> None:
    rows = layer_rows(make_run(dtype="float64", value_scale=1e39))
    with pytest.raises(
        TrainingError, match=r"blocks\.0, contribution-positive: in torch\.float32, sample shard-000000/"
    ):
        rows.load()


def test_rows_that_are_all_equal_are_refused(make_run: Callable[..., Path]) -> None:
    rows = layer_rows(make_run(value_scale=0.0))
    with pytest.raises(TrainingError, match="all values of the 61 fit rows are equal"):
        rows.calibration()


def test_unlabelled_rows_train_without_mode_statistics(
    make_run: Callable[..., Path],
    make_groups: Callable[..., tuple[SaeGroup, ...]],
    make_task: Callable[..., TrainingTask],
) -> None:
    task = make_task(make_run(labelled=False), make_groups(epochs=2)[:1])
    train_on_rank(task, Ranks())
    metrics = json.loads((task.folder(task.jobs[0]) / "metrics.json").read_text())
    assert "modes_class_correlated" not in metrics["select"]
    assert math.isfinite(metrics["select"]["ev"])


@pytest.mark.parametrize("rate", [1e38, 1e200])
def test_a_training_that_diverges_names_the_sae(
    make_run: Callable[..., Path], make_task: Callable[..., TrainingTask], rate: float
) -> None:
    wild = SaeGroup(
        architecture=Choice(name="stsae", options={"hidden": 8}),
        quantities=("contribution-positive",),
        training=TrainingSettings(epochs=1, learning_rate=rate),
    )
    with pytest.raises(TrainingError, match=r"blocks\.0/contribution-positive/stsae diverged by epoch 1 .*lower"):
        train_on_rank(make_task(make_run(), (wild,)), Ranks())
