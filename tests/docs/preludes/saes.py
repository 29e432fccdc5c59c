# What docs/saes.md takes for granted: rows of contributions, a store, and an SAE of the demo.
import numpy as np
import pyarrow as pa
import torch

from codec_dist.sae import build
from codec_dist.store import BlockWriter, create_store

rows, held_out_rows = torch.rand(64, 64), torch.rand(32, 64)
some_rows, batch = rows[:32], rows[:16]
build("topk", {"modes": 128, "k": 4}, channels=64).save("runs/demo/sae/blocks.5/contribution-positive/5f0c…-s0")

create_store(
    "runs/demo/store",
    identity={"model": "of the page"},
    layers={"blocks.5": 64},
    targets=["top_1"],
    quantities=["contribution-positive"],
    shards=[("shard-000000.tar", len(rows))],
)
table = {"key": [str(row) for row in range(len(rows))], "label": pa.array([0] * len(rows), pa.int32())}
table |= {name: np.zeros(len(rows)) for name in ("target_value", "baseline_value")}
table |= {"prediction": np.zeros(len(rows), np.int64)}
BlockWriter("runs/demo/store").write(0, {("blocks.5", "contribution-positive"): rows.numpy()}, pa.table(table))
