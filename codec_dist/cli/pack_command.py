"""What `shards pack` is asked to pack, and the summaries of `shards pack` and `shards index`."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow.compute as pc

from codec_dist.shards import (
    CountedSource,
    Sample,
    ShardIndex,
    Tally,
    digits,
    image_folder,
    is_parquet,
    parquet_images,
    read_class_list,
    shapes,
)
from codec_dist.utils import CodecError

# Options that only one kind of source has, by the name of their value.
SHAPES_OPTIONS = {"count": "--count", "size": "--size", "image_format": "--format"}
PARQUET_OPTIONS = {"image_column": "--image-column", "label_column": "--label-column"}
FOLDER, PARQUET = "an image folder", "Parquet files"


def image_source(arguments: argparse.Namespace) -> tuple[Iterable[Sample], list[str], Mapping[str, bytes]]:
    """The images, the names of their classes, and what else is to lie beside the shards.

    Raises:
        CodecError: an option of another kind of source is given, or the source cannot be read.
    """
    name = arguments.source
    kind = name if name in ("digits", "shapes") else PARQUET if is_parquet(name) else FOLDER
    shapes_options = _given(arguments, SHAPES_OPTIONS, kind, "shapes")
    parquet_options = _given(arguments, PARQUET_OPTIONS, kind, PARQUET)
    if kind == "shapes":
        if arguments.classes is not None:
            shapes_options["classes"] = _number_of_classes(arguments.classes)
        drawn, classes = shapes(seed=arguments.seed, **shapes_options)
        return drawn, classes, drawn.beside
    if kind == "digits":
        if arguments.classes is not None:
            raise CodecError("--classes is an option for shapes, folders and Parquet files, but digits is digits")
        return *digits(), {}
    listed = None if arguments.classes is None else read_class_list(arguments.classes)
    if kind == PARQUET:
        return *parquet_images(name, **parquet_options, class_list=listed), {}
    return *image_folder(name, listed), {}


def describe(index: ShardIndex, source: object = None) -> str:
    """The summary of shards: samples, labels, classes, what was left out and why, and what cannot be used.

    Args:
        index: of the shards.
        source: what they were packed from, if they were just packed.
    """
    return "\n".join([*_contents(index), *_unusable(index), *_labels(index), *_left_out(index, source)])


def _contents(index: ShardIndex) -> Iterator[str]:
    count = len(index.shards)
    yield f"{index.location}: {index.sample_count:,} samples in {count:,} shard{'s' if count != 1 else ''}"
    if empty := [shard.name for shard in index.shards if not shard.samples]:
        yield f"{len(empty):,} of the shards without samples, first {empty[0]}"


def _labels(index: ShardIndex) -> Iterator[str]:
    labels = index.samples()["label"].drop_null()
    used = len(pc.unique(labels))
    names = "" if index.classes is None else f" of {len(index.classes):,} in classes.json"
    between = f", labels {pc.min(labels)} to {pc.max(labels)}" if used else ""
    yield f"labelled: {len(labels):,} samples, {used:,} classes{names}{between}"


def _left_out(index: ShardIndex, source: object) -> Iterator[str]:
    if isinstance(source, CountedSource):
        yield from _counts("left out", source.left_out, "nothing")
        yield from _counts("stored in another form", source.changed)
        yield from (f"note: {note}" for note in source.notes)
    elif index.findings is not None:
        yield from _counts("left out (members of no sample)", index.findings.passed_over, "nothing")


def _unusable(index: ShardIndex) -> Iterator[str]:
    total = index.findings.unusable.total if index.findings is not None else index.problem_count
    if total:
        shard = next((shard for shard in index.shards if shard.problems), None)
        first = f", first number {shard.problems[0][0]} in {shard.name}: {shard.problems[0][1]}" if shard else ""
        yield f"{total:,} samples cannot be used by their keys and labels alone{first}"
    if index.findings is not None:
        yield from (f"  {line}" for line in index.findings.unusable.lines())


def _counts(title: str, tally: Tally, nothing: str | None = None) -> Iterator[str]:
    if tally.total or nothing:
        yield f"{title}: {f'{tally.total:,}' if tally.total else nothing}"
    yield from (f"  {line}" for line in tally.lines())


def _number_of_classes(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise CodecError(f"--classes {text!r}: shapes take a whole number of classes, at least 1")
    return int(text)


def _given(arguments: argparse.Namespace, options: Mapping[str, str], kind: str, owner: str) -> dict[str, Any]:
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    if given and kind != owner:
        option = options[next(iter(given))]
        raise CodecError(f"{option} is an option for {owner}, but {arguments.source} is {kind}: leave it out")
    return given
