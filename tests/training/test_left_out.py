"""What cannot be trained on one layer leaves the training of the others as it would be without that layer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from codec_dist.config import Choice, ClusterSection, SaeGroup, SaeSection, TrackingSection, TrainingSettings
from codec_dist.store import BlockWriter, ContributionStore, StoreError, finish_store
from codec_dist.training import TrainingError, read_left_out, train_saes
from codec_dist.training.collectives import Ranks
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask
from codec_dist.training.saving import LEFT_OUT_FILE

Run = Callable[..., Path]
Task = Callable[..., TrainingTask]

QUANTITY = "contribution-positive"
TOPK = SaeGroup(
    architecture=Choice(name="topk", options={"modes": 10, "k": 2}),
    quantities=(QUANTITY,),
    training=TrainingSettings(epochs=4, batch_size=16, learning_rate=0.02),
)
PCA = TOPK.model_copy(update={"architecture": Choice(name="pca", options={"modes": 4})})


def rewrite(run: Path, layer: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write the store again with other rows of one layer."""
    store = ContributionStore(run / "store")
    writer = BlockWriter(run / "store")
    for number, (shard, _) in enumerate(store.shards):
        values = {}
        for each in store.layers:
            for quantity in store.quantities:
                (block,) = store.blocks(each, quantity, [number])
                values[each, quantity] = change(block.values) if each == layer else block.values
        samples = store.samples.filter(np.array(store.samples["shard"].to_pylist()) == shard)
        writer.write(number, values, samples.drop_columns(["shard", "row"]))
    finish_store(run / "store")


def weights(task: TrainingTask, layer: str) -> list[dict[str, torch.Tensor]]:
    folders = [task.folder(job) for job in task.jobs if job.layer == layer]
    return [load_file(folder / "model.safetensors") for folder in folders if folder.exists()]


def left_out(task: TrainingTask) -> dict[str, str]:
    return {one.layer: one.reason for one in read_left_out(task.scratch)}


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (np.zeros_like, "float32"),
        (lambda rows: np.full_like(rows, 0.25), "float32"),
        (lambda rows: rows * np.float32(1e-44), "float32"),
        (lambda rows: rows * 1e39, "float64"),
    ],
    ids=["zeros", "all equal", "too small to be scaled", "beyond the type of training"],
)
@pytest.mark.parametrize("memory", [None, 0], ids=["in memory", "streamed"])
def test_rows_that_no_sae_can_use_are_left_out_and_the_others_trained(
    make_run: Run, make_task: Task, change: Callable[[np.ndarray], np.ndarray], dtype: str, memory: int | None
) -> None:
    run = make_run(dtype=dtype)
    # All equal, negative parts stay negative.
    rewrite(run, "blocks.0", lambda rows: np.copysign(change(np.abs(rows)), rows.sum()))
    task = make_task(run, (TOPK, PCA), bytes_for_rows=memory)
    train_on_rank(task, Ranks())
    assert left_out(task).keys() == {"blocks.0"}
    assert "blocks.0, contribution-positive" in left_out(task)["blocks.0"]
    assert [task.folder(job).exists() for job in task.jobs] == [job.layer == "blocks.1" for job in task.jobs]

    # A store of the same identity, whose other layer is as it was: what comes of blocks.1 must be the same bits.
    alone = make_task(make_run(dtype=dtype, name="alone"), (TOPK, PCA), bytes_for_rows=memory)
    alone = replace(alone, jobs=tuple(job for job in alone.jobs if job.layer == "blocks.1"))
    train_on_rank(alone, Ranks())
    for found, expected in zip(weights(task, "blocks.1"), weights(alone, "blocks.1"), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("stsae", {"hidden": 8}),
        ("topk", {"modes": 10, "k": 2, "dead_window": 20, "resample_every": 40}),
        ("batchtopk", {"modes": 10, "k": 2}),
        ("relu", {"modes": 10}),
        ("gated", {"modes": 10}),
        ("jumprelu", {"modes": 10}),
    ],
)
def test_an_sae_that_diverges_leaves_those_beside_it_as_they_were(
    make_run: Run, make_task: Task, architecture: str, options: dict[str, int]
) -> None:
    """All advance together; the one with an absurd rate has the same rows and epochs."""
    wild = TOPK.model_copy(
        update={
            "architecture": Choice(name=architecture, options=options),
            "training": TOPK.training.model_copy(update={"learning_rate": 1e38}),
        }
    )
    run = make_run()
    together = make_task(run, (TOPK, wild))
    train_on_rank(together, Ranks())
    gone = read_left_out(together.scratch)
    assert [(one.layer, one.architecture) for one in gone] == [("blocks.0", architecture), ("blocks.1", architecture)]
    assert all("learning_rate" in one.reason for one in gone)
    found = [weights(together, layer)[0] for layer in ("blocks.0", "blocks.1")]

    alone = make_task(make_run(name="alone"), (TOPK,))
    train_on_rank(alone, Ranks())
    for one, layer in zip(found, ("blocks.0", "blocks.1"), strict=True):
        (expected,) = weights(alone, layer)
        assert all(torch.equal(one[name], expected[name]) for name in expected)


def test_a_decomposition_that_cannot_be_fitted_leaves_the_others_alone(make_run: Run, make_task: Task) -> None:
    """NMF needs rows of one sign, and net contributions have both."""
    net = ("contribution-net",)
    nmf = TOPK.model_copy(
        update={"architecture": Choice(name="nmf", options={"modes": 4}), "quantities": net, "layers": ("blocks.0",)}
    )
    run = make_run()
    rewrite(run, "blocks.0", lambda rows: rows * np.random.default_rng(len(rows)).random(rows.shape).astype(rows.dtype))
    task = make_task(run, (nmf, TOPK))
    train_on_rank(task, Ranks())
    assert [(one.layer, one.architecture) for one in read_left_out(task.scratch)] == [("blocks.0", "nmf")]
    assert [task.folder(job).exists() for job in task.jobs] == [False, True, True]


def test_where_nothing_can_be_trained_that_is_an_error(make_run: Run, make_task: Task) -> None:
    task = make_task(make_run(value_scale=0.0), (TOPK,))
    with pytest.raises(TrainingError, match=r"no SAE could be trained: blocks\.0"):
        train_on_rank(task, Ranks())


def test_a_damaged_block_is_an_error_after_the_other_layers_are_trained(make_run: Run, make_task: Task) -> None:
    run = make_run()
    task = make_task(run, (TOPK,))
    next((run / "store/arrays.zarr").glob("layers/blocks.0/contribution/*/positive/c.1.0")).unlink()
    with pytest.raises(StoreError, match=r"blocks\.0.*all other SAEs were trained"):
        train_on_rank(task, Ranks())
    assert [task.folder(job).exists() for job in task.jobs] == [False, True]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "saes"])
def test_two_ranks_leave_out_the_same_and_the_run_says_so(
    make_run: Run, ray_cluster: object, spread: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    rewrite(run, "blocks.0", np.zeros_like)
    section = SaeSection(groups=(TOPK,), spread=spread)
    disabled = TrackingSection(mode="disabled")
    arguments = (run / "store", run / "split.parquet", (TOPK,), section, run, 7, ClusterSection(), disabled)
    for _ in range(2):  # again, when all that can be is trained
        trained = train_saes(*arguments)
        assert [(sae.layer, sae.selected) for sae in trained] == [("blocks.1", True)]
        (gone,) = json.loads((run / "sae" / LEFT_OUT_FILE).read_text())
        assert (gone["layer"], gone["quantity"]) == ("blocks.0", QUANTITY)
        assert sum("left out" in line and "blocks.0" in line for line in capsys.readouterr().err.splitlines()) == 1
    assert json.loads((run / "sae/selected.json").read_text()).keys() == {"blocks.1"}
