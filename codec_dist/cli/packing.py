"""What `shards pack` is asked to pack, and how an index is told in a few lines."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from codec_dist.shards import Sample, ShardIndex, digits, image_folder, is_parquet, parquet_images, shapes
from codec_dist.shards.parts import PARTS_FILE
from codec_dist.utils import CodecError

# Options that only one kind of source has, by the name of their value.
SHAPES_OPTIONS = {"count": "--count", "size": "--size", "classes": "--classes", "image_format": "--format"}
PARQUET_OPTIONS = {"image_column": "--image-column", "label_column": "--label-column"}


def image_source(arguments: argparse.Namespace) -> tuple[Iterable[Sample], list[str], Mapping[str, bytes]]:
    """The images, the names of their classes, and what else is to lie beside the shards.

    Raises:
        CodecError: an option of another kind of source is given, or the source cannot be read.
    """
    name = arguments.source
    kind = name if name in ("digits", "shapes") else "Parquet files" if is_parquet(name) else "an image folder"
    shapes_options = _given(arguments, SHAPES_OPTIONS, kind, "shapes")
    parquet_options = _given(arguments, PARQUET_OPTIONS, kind, "Parquet files")
    if kind == "shapes":
        drawn, classes = shapes(seed=arguments.seed, **shapes_options)
        return drawn, classes, {PARTS_FILE: drawn.parts.to_json()}
    if kind == "digits":
        return *digits(), {}
    return *(parquet_images(name, **parquet_options) if kind == "Parquet files" else image_folder(name)), {}


def describe(index: ShardIndex) -> str:
    """Place, samples and shards, and what in them cannot be used."""
    count = len(index.shards)
    lines = [f"{index.location}: {index.sample_count:,} samples in {count:,} shard{'s' if count != 1 else ''}"]
    if empty := [shard.name for shard in index.shards if not shard.samples]:
        lines.append(f"{len(empty):,} of the shards without samples, first {empty[0]}")
    if index.fault_count:
        shard = next(shard for shard in index.shards if shard.faults)
        position, reason = shard.faults[0]
        counts = f"{index.fault_count:,} samples cannot be used by their keys and labels alone"
        lines.append(f"{counts}, first number {position} in {shard.name}: {reason}")
    return "\n".join(lines)


def _given(arguments: argparse.Namespace, options: Mapping[str, str], kind: str, owner: str) -> dict[str, Any]:
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    if given and kind != owner:
        option = options[next(iter(given))]
        raise CodecError(f"{option} is an option for {owner}, but {arguments.source} is {kind}: leave it out")
    return given
