"""Small contribution stores with known structure, and their splits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codec_dist.config import Choice, SaeGroup, TrackingSection, TrainingSettings
from codec_dist.store import BlockWriter, ContributionStore, create_store, finish_store
from codec_dist.training.parts import read_parts
from codec_dist.training.sae_jobs import TrainingTask, plan_jobs

PARTS = ("fit", "fit", "fit", "select", "evaluate")
CLASSES = 4


@pytest.fixture
def make_run(tmp_path: Path, make_run_in: Callable[..., Path]) -> Callable[..., Path]:
    """A factory of run folders; see ``make_run_in``."""
    return partial(make_run_in, tmp_path)


@pytest.fixture(scope="session")
def make_run_in() -> Callable[..., Path]:
    """A factory of run folders, inside a given one, that hold ``store`` and ``split.parquet``.

    Rows are sparse nonnegative mixtures of a hidden dictionary per layer, plus a little noise; the label
    of a row is its strongest atom modulo the number of classes.
    """

    def make(
        folder: Path,
        layers: dict[str, int] | None = None,
        shard_sizes: tuple[int, ...] = (40, 40, 23),
        dtype: str = "float32",
        labelled: bool = True,
        value_scale: float = 1.0,
        name: str = "run",
    ) -> Path:
        run, layers = folder / name, layers or {"blocks.0": 8, "blocks.1": 12}
        quantities = ["contribution-positive", "contribution-negative", "activation-positive"]
        names = [f"shard-{number:06d}" for number in range(len(shard_sizes))]
        create_store(
            run / "store",
            identity={"data": "synthetic", "sizes": list(shard_sizes), "dtype": dtype},
            layers=layers,
            targets=["top_1"],
            quantities=quantities,
            shards=list(zip(names, shard_sizes, strict=True)),
            dtype=dtype,
        )
        writer, split = BlockWriter(run / "store"), []
        for number, (shard, rows) in enumerate(zip(names, shard_sizes, strict=True)):
            generator = np.random.default_rng(number)
            codes = generator.exponential(size=(rows, 6)) * (generator.random((rows, 6)) < 0.3)
            values = {}
            for layer, channels in layers.items():
                for place, quantity in enumerate(quantities):
                    atoms = np.abs(np.random.default_rng([place, channels]).normal(size=(6, channels)))
                    mixed = codes @ atoms + 0.01 * generator.random((rows, channels))
                    sign = -1 if quantity.endswith("negative") else 1
                    values[layer, quantity] = (sign * value_scale * mixed).astype(dtype)
            labels = codes.argmax(1) % CLASSES
            writer.write(number, values, _samples(rows, labels if labelled else None))
            split += [(shard, f"{row:04d}", PARTS[(row + number) % len(PARTS)]) for row in range(rows)]
        finish_store(run / "store")
        shards, keys, parts = zip(*split, strict=True)
        pq.write_table(pa.table({"shard": shards, "key": keys, "part": parts}), run / "split.parquet")
        return run

    return make


def _samples(rows: int, labels: np.ndarray | None) -> pa.Table:
    found = pa.nulls(rows, pa.int32()) if labels is None else pa.array(labels.astype(np.int32))
    return pa.table(
        {
            "key": [f"{row:04d}" for row in range(rows)],
            "label": found,
            "prediction": pa.array(np.zeros(rows, np.int32)),
            "target_value": pa.array(np.zeros(rows)),
            "baseline_value": pa.array(np.zeros(rows)),
        }
    )


TOPK = {"modes": 10, "k": 2, "dead_window": 120}
STSAE = {"hidden": 8, "threshold": 0.5, "dropout": 0.1}


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., tuple[SaeGroup, ...]]:
    """TopK on every layer with a cosine schedule, stsae on the last one with the plateau schedule."""

    def make(
        epochs: int = 6, quantities: tuple[str, ...] = ("contribution-positive",), **stsae: object
    ) -> tuple[SaeGroup, ...]:
        fast = TrainingSettings(epochs=epochs, batch_size=16, learning_rate=0.02)
        plateau = TrainingSettings(epochs=epochs, batch_size=16, learning_rate=0.01, schedule="plateau", patience=1)
        return (
            SaeGroup(architecture=Choice(name="topk", options=TOPK), quantities=quantities, training=fast),
            SaeGroup(
                architecture=Choice(name="stsae", options=STSAE | stsae),
                layers=("blocks.1",),
                quantities=quantities,
                training=plateau,
            ),
        )

    return make


@pytest.fixture(scope="session")
def make_task() -> Callable[..., TrainingTask]:
    """A factory of what ranks are told about a run folder; W&B stays out."""

    def make(run: Path, groups: tuple[SaeGroup, ...], **changes: Any) -> TrainingTask:
        store = ContributionStore(run / "store")
        jobs = plan_jobs(store, groups, read_parts(store, run / "split.parquet").split_hash, seed=7)
        values: dict[str, Any] = {
            "directory": run,
            "store_path": run / "store",
            "split_path": run / "split.parquet",
            "jobs": tuple(jobs),
            "name": "test",
            "seed": 7,
            "evaluations": 2,
            "checkpoints": 2,
            "tracking": TrackingSection(mode="disabled"),
        }
        return TrainingTask(**(values | changes))

    return make
