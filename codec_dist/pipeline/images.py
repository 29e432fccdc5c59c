"""Images of a run, as the model sees them: a part of the split, or chosen samples of a shard."""

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.config import Config
from codec_dist.models import LoadedModel, load_model
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.shards import Retries, ShardIndex, ShardInfo, configured_index, read_shard
from codec_dist.utils import CodecError, without_credentials

SECONDS_FOR_A_LOOK = 10.0

MODELS_KEPT = 2
_LOADED: dict[tuple[str, int, tuple[int, int] | None], LoadedModel] = {}


@dataclass(frozen=True)
class PreparedImage:
    """One sample, decoded and preprocessed."""

    key: str
    label: int
    """−1 where there is none."""
    image: Float[Tensor, "channel height width"]


def run_index(config: Config) -> ShardIndex:
    """The index of the run's shards, after ``data.limit``."""
    return configured_index(config)


def unreadable_shards(config: Config, seconds: float = SECONDS_FOR_A_LOOK) -> str | None:
    """Why remote shards cannot be read within a short time, for those who could do without; None: they can be."""
    if "://" not in config.data.shards:
        return None
    reasons: list[str] = []

    def look() -> None:
        try:
            configured_index(config, Retries(attempts=2))
        except CodecError as error:
            reasons.append(str(error))

    # Libraries of object stores have time limits of their own, which are minutes.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        reasons.append(without_credentials(f"{config.data.shards} did not answer within {seconds:g} s"))
    return reasons[0] if reasons else None


def load_run_model(config: Config) -> LoadedModel:
    """The run's model; loaded once per process, and again when its weights file changes."""
    weights = Path(config.model.weights)
    changed = (weights.stat().st_mtime_ns, weights.stat().st_size) if weights.is_file() else None
    key = config.model.model_dump_json(), config.run.seed, changed
    if key not in _LOADED:
        loaded = load_model(config.model, seed=config.run.seed)
        while len(_LOADED) >= 2 * MODELS_KEPT:
            _LOADED.pop(next(iter(_LOADED)))
        # The section with what followed from the weights names the same model.
        _LOADED[key] = _LOADED[loaded.section.model_dump_json(), config.run.seed, changed] = loaded
    return _LOADED[key]


def shard_images(config: Config, info: ShardInfo, keys: Collection[str]) -> Iterator[PreparedImage]:
    """The samples of one shard whose keys are asked for, in the shard's order; undecodable ones are left out."""
    preprocessing = load_run_model(config).preprocessing
    decoded = read_shard(
        config.data.shards,
        info,
        image_fields=config.data.image_fields,
        label_field=config.data.label_field,
        threads=config.data.decode_threads,
        keys=keys,
    )
    for sample in decoded:
        if sample.image is not None:
            label = -1 if sample.label is None else sample.label
            yield PreparedImage(sample.key, label, preprocessing(sample.image))


def part_images(
    config: Config, part: str
) -> tuple[Float[Tensor, "samples channel height width"], Int[Tensor, " samples"]]:
    """All images of a part of the split, in memory; for data sets as small as the demo's.

    Raises:
        PipelineError: the part holds no image.
    """
    split = pq.read_table(RunDirectory(config.run.directory).split)
    split = split.filter(pc.equal(split["part"], part))
    images, labels = [], []
    for info in run_index(config).shards:
        keys = split.filter(pc.equal(split["shard"], info.name))["key"].to_pylist()
        for sample in shard_images(config, info, keys):
            images.append(sample.image)
            labels.append(sample.label)
    if not images:
        raise PipelineError(f"the {part} part of {Path(config.data.shards)} holds no image")
    return torch.stack(images), torch.tensor(labels)
