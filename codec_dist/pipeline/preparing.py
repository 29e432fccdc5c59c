"""The stage `prepare`: the index of the shards, and the split into three parts."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from codec_dist.config import Config
from codec_dist.modes import assign_parts
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.images import load_run_model, run_index
from codec_dist.pipeline.stage import StageContext
from codec_dist.shards import PARTS, configured_split
from codec_dist.store import ContributionStore
from codec_dist.utils import write_bytes_atomically


def prepare(context: StageContext) -> dict[str, Any]:
    """Index the shards where that was not done, and write split.parquet."""
    config = context.config
    index = run_index(config)
    table = configured_split(config, index.samples())
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes_atomically(context.run.split, buffer.getvalue())
    counts = {part: pc.sum(pc.equal(table["part"], part)).as_py() or 0 for part in PARTS}
    return {"shards": len(index.shards), "samples": len(table), **counts}


def stored_part(context: StageContext, part: str) -> pa.Table:
    """The stored samples (shard, key, label) of one part of the split, in the store's order."""
    samples = ContributionStore(context.run.store).samples.select(["shard", "key", "label"])
    codes = assign_parts(samples, pq.read_table(context.run.split))
    return samples.filter(pa.array((codes == PARTS.index(part)).numpy()))


def class_names(config: Config) -> tuple[str, ...]:
    """Names of the classes: those beside the shards, else the numbers of the model's outputs.

    Raises:
        PipelineError: the shards name more classes than the model has.
    """
    names, outputs = run_index(config).classes, load_run_model(config).classes
    if names is None:
        return tuple(map(str, range(outputs or 0)))
    if outputs is not None and len(names) > outputs:
        raise PipelineError(
            f"{config.data.shards} has {len(names)} classes, the model {config.model.spec} has {outputs} outputs: "
            "take a model of these classes, or pack shards with the model's classes"
        )
    return tuple(names)
