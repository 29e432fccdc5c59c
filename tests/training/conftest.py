"""Small contribution stores with known structure, and their splits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codec_dist.store import BlockWriter, create_store, finish_store

PARTS = ("fit", "fit", "fit", "select", "evaluate")
CLASSES = 4


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A factory of run folders that hold ``store`` and ``split.parquet``.

    Rows are sparse nonnegative mixtures of a hidden dictionary per layer, plus a little noise; the label
    of a row is its strongest atom modulo the number of classes.
    """

    def make(
        layers: dict[str, int] | None = None,
        shard_sizes: tuple[int, ...] = (40, 40, 23),
        dtype: str = "float32",
        labelled: bool = True,
        value_scale: float = 1.0,
        name: str = "run",
    ) -> Path:
        run, layers = tmp_path / name, layers or {"blocks.0": 8, "blocks.1": 12}
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
