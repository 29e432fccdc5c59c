"""Grids, every architecture, every sign, early stops and resampling, through the trainer on one rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from codec_dist.config import Choice, SaeGroup, TrainingSettings
from codec_dist.sae import SparseAutoencoder, build
from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.optimizer import group_alike
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import SaeJob, TrainingTask

Run, Task = Callable[..., Path], Callable[..., TrainingTask]
FAST = TrainingSettings(epochs=6, batch_size=16, learning_rate=0.02)


def group(architecture: str, options: dict[str, Any], **fields: Any) -> SaeGroup:
    defaults = {"layers": ("blocks.1",), "quantities": ("contribution-positive",), "training": FAST}
    return SaeGroup(architecture=Choice(name=architecture, options=options), **(defaults | fields))


def metrics(task: TrainingTask, job: SaeJob) -> dict[str, Any]:
    return json.loads((task.folder(job) / "metrics.json").read_text())


def rows_of(run: Path, part: str, layer: str = "blocks.1", quantity: str = "contribution-positive") -> np.ndarray:
    store = ContributionStore(run / "store")
    return store.read(layer, quantity, store.find(part=part, split=pq.read_table(run / "split.parquet")))


def state(task: TrainingTask, job: SaeJob) -> dict[str, torch.Tensor]:
    return SparseAutoencoder.load(task.folder(job)).state_dict()


def test_saes_of_a_grid_are_those_trained_alone(make_run: Run, make_task: Task) -> None:
    """To rounding: those of one shape are one batched computation, the others advance beside it."""
    grids = (
        group("relu", {"modes": 9}, grid={"l1": (0.05, 0.3), "training.learning_rate": (0.02, 0.005)}, seeds=(0, 1)),
        group("stsae", {"hidden": 7, "threshold": 0.5, "dropout": 0.3}, grid={"modes": (8, 9), "l1": (0.0, 0.1)}),
    )
    together = make_task(make_run(dtype="float64", name="together"), grids, dtype="float64")
    assert len(together.jobs) == 12
    train_on_rank(together, Ranks())
    for number in (1, 7, 11):
        run = make_run(dtype="float64", name=f"alone-{number}")
        alone = make_task(run, grids, dtype="float64", jobs=(together.jobs[number],))
        train_on_rank(alone, Ranks())
        job = alone.jobs[0]
        torch.testing.assert_close(state(together, job), state(alone, job), rtol=1e-9, atol=1e-11)
        assert metrics(together, job)["evaluate"]["ev"] == pytest.approx(metrics(alone, job)["evaluate"]["ev"])
    assert not torch.equal(state(together, together.jobs[0])["decoder"], state(together, together.jobs[1])["decoder"])


def test_saes_of_one_shape_are_stacked() -> None:
    saes = [build("relu", {"modes": 6, "l1": weight}, 4, seed) for seed, weight in enumerate((0.1, 0.2, 0.1))]
    saes += [build("relu", {"modes": 7}, 4), build("gated", {"modes": 6}, 4)]
    saes += [build("topk", {"modes": 6, "k": k}, 4) for k in (1, 2, 1)]
    saes += [build("batchtopk", {"modes": 6, "k": k}, 4) for k in (1, 2)]
    assert group_alike(saes, [0] * len(saes)) == [[0, 1, 2], [3], [4], [5, 7], [6], [8, 9]]
    assert group_alike(saes[:3], [0, 1, 0]) == [[0, 2], [1]]


OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"modes": 16, "l1": 0.02},
    "topk": {"modes": 16, "k": 4},
    "batchtopk": {"modes": 16, "k": 4},
    "matryoshka": {"modes": 16, "k": 4},
    "jumprelu": {"modes": 16, "resample_every": 130},
    "gated": {"modes": 16, "l1": 0.02, "nonnegative": True},
    "stsae": {"modes": 16, "hidden": 16, "threshold": 0.5, "initial_l0": 4, "auxk": 3},
    "pca": {"modes": 6},
    "nmf": {"modes": 6},
}


def test_every_architecture_passes_through_the_trainer(make_run: Run, make_task: Task) -> None:
    settings = FAST.model_copy(update={"epochs": 12, "warmup": 0.1, "gradient_clip": 5.0})
    groups = [group(name, options, training=settings) for name, options in OPTIONS.items()]
    task = make_task(make_run(), tuple(groups))
    train_on_rank(task, Ranks())
    for job in task.jobs:
        found, sae = metrics(task, job), SparseAutoencoder.load(task.folder(job))
        assert (sae.architecture, sae.sign) == (job.architecture, "positive")
        assert found["evaluate"]["ev"] > 0.1, job.architecture
        assert found["training"]["epochs"] == (1 if job.fitted else 12)
        lines = (task.folder(job) / "history.jsonl").read_text().splitlines()
        assert len(lines) == (1 if job.fitted else 2)
        rows = torch.from_numpy(rows_of(task.directory, "evaluate"))
        assert sae.metrics([rows]).ev == pytest.approx(found["evaluate"]["ev"], rel=1e-4)


def test_pca_is_that_of_the_fit_rows(make_run: Run, make_task: Task) -> None:
    task = make_task(make_run(dtype="float64"), (group("pca", {"modes": 3}),), dtype="float64")
    train_on_rank(task, Ranks())
    fit, held_out = (rows_of(task.directory, part) for part in ("fit", "evaluate"))
    components = np.linalg.svd(fit - fit.mean(0), full_matrices=False)[2][:3]
    rest = (held_out - fit.mean(0)) - (held_out - fit.mean(0)) @ components.T @ components
    expected = 1 - np.square(rest).sum() / np.square(held_out - held_out.mean(0)).sum()
    assert metrics(task, task.jobs[0])["evaluate"]["ev"] == pytest.approx(expected, abs=1e-9)


def test_both_signs_net_and_negative_rows_are_decomposed(make_run: Run, make_task: Task) -> None:
    signs = tuple(f"contribution-{sign}" for sign in ("both", "net", "negative"))
    groups = (
        group("topk", {"modes": 16, "k": 4}, quantities=signs, training=FAST.model_copy(update={"epochs": 3})),
        group("nmf", {"modes": 6}, quantities=("contribution-negative", "contribution-both")),
    )
    task = make_task(make_run(), groups)
    train_on_rank(task, Ranks())
    saes = {(job.quantity, job.architecture): SparseAutoencoder.load(task.folder(job)) for job in task.jobs}
    both = saes["contribution-both", "topk"]
    assert (both.sign, both.channels, both.layer_channels) == ("both", 24, 12)
    parts = [
        torch.from_numpy(rows_of(task.directory, "evaluate", quantity=f"contribution-{sign}"))
        for sign in ("positive", "negative")
    ]
    ev = next(metrics(task, job)["evaluate"]["ev"] for job in task.jobs if job.quantity == "contribution-both")
    assert both.metrics([torch.cat(parts, 1)]).ev == pytest.approx(ev, rel=1e-4)
    assert [saes[f"contribution-{sign}", "topk"].sign for sign in ("net", "negative")] == ["net", "negative"]
    assert (saes["contribution-negative", "nmf"].dictionary <= 0).all()
    assert (saes["contribution-both", "nmf"].dictionary[:, :12] >= 0).all()
    assert (saes["contribution-both", "nmf"].dictionary[:, 12:] <= 0).all()


def test_a_training_that_no_longer_improves_ends_and_the_others_go_on(make_run: Run, make_task: Task) -> None:
    settings = FAST.model_copy(update={"epochs": 12, "early_stop": 3, "schedule": "constant"})
    rates = (1e-12, 0.02, 3e-12)  # two that never improve by a ten-thousandth
    grid = (group("relu", {"modes": 9}, grid={"training.learning_rate": rates}, training=settings),)
    task = make_task(make_run(dtype="float64", name="many"), grid, dtype="float64")
    train_on_rank(task, Ranks())
    done = [metrics(task, job)["training"]["epochs"] for job in task.jobs]
    assert (done[0], done[2]) == (4, 4)
    assert done[1] > 4
    entries = [json.loads(line) for line in (task.folder(task.jobs[0]) / "history.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [4]
    alone = make_task(make_run(dtype="float64", name="alone"), grid, dtype="float64", jobs=task.jobs[1:2])
    train_on_rank(alone, Ranks())
    torch.testing.assert_close(state(task, task.jobs[1]), state(alone, task.jobs[1]), rtol=1e-9, atol=1e-11)


def test_resampling_brings_modes_back(make_run: Run, make_task: Task) -> None:
    """A penalty so high at first sight that most modes die, with and without the remedy."""
    settings = FAST.model_copy(update={"epochs": 30})
    options = {"modes": 24, "threshold": 0.9, "hidden": 16, "dead_window": 60, "dropout": 0.0}
    grid = (group("stsae", options, grid={"resample_every": (None, 300)}, training=settings),)
    task = make_task(make_run(), grid)
    train_on_rank(task, Ranks())
    bare, resampled = (metrics(task, job)["select"] for job in task.jobs)
    assert resampled["modes_alive"] > bare["modes_alive"] + 3
    assert resampled["ev"] > bare["ev"]
