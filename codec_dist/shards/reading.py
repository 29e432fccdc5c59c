"""Reading one shard: a stream of decoded images in the order of the tar, checked against the index."""

import io
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.index import ShardInfo
from codec_dist.shards.labels import read_label
from codec_dist.shards.location import Location
from codec_dist.shards.streams import HashingStream, stream_samples

# Formats that Pillow decodes by itself; it hands some others, such as EPS, to programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclass(frozen=True)
class Decoded:
    """A sample of a shard: its image, or what is wrong with it."""

    key: str
    position: int
    """Number of the sample in its shard, from 0."""
    label: int | None
    image: Image.Image | None
    """The decoded image in its own mode (L, RGB, P, …); None if there is an error."""
    error: str | None
    """Why the sample cannot be used; None if it can."""


def read_shard(
    location: str | Path,
    info: ShardInfo,
    *,
    image_fields: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
    label_field: str = "cls",
    threads: int = 1,
    keys: Collection[str] | None = None,
) -> Iterator[Decoded]:
    """Decode the samples of a shard, in the order of the tar.

    A bad image or label is an item with ``error``, not an exception. Only the first of ``image_fields``
    that a sample has is decoded. With ``threads`` > 1 decoding runs ahead by at most two images per thread.
    After the last sample the shard's fingerprint is compared with the index.

    Args:
        location: folder or URL of the shards.
        info: the shard's entry in the index; its first ``info.samples`` samples are read.
        image_fields: extensions that hold an image.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        threads: threads that decode.
        keys: decode and yield only the samples with these keys; default: all.

    Raises:
        ShardError: the tar is missing, cut short, damaged or another than the indexed one, with the counts
            found. It is raised while iterating: what was yielded before it must be discarded.
    """
    place = Location(location)
    _check_size(place, info, label_field)
    raw: Iterator[tuple[int, dict[str, Any]]] = _read_raw(place, info)
    if keys is not None:
        wanted = frozenset(keys)
        raw = (item for item in raw if item[1]["__key__"] in wanted)
    image_fields = [extension.lower() for extension in image_fields]

    def decode(item: tuple[int, dict[str, Any]]) -> Decoded:
        return _decode(*item, image_fields, label_field)

    yield from map(decode, raw) if threads <= 1 else _map_in_threads(decode, raw, threads)


def _check_size(place: Location, info: ShardInfo, label_field: str) -> None:
    """Refuse a tar of another size before anything is computed from it."""
    size = place.size(info.name)
    if size is not None and size != info.bytes:
        found = sum(1 for _ in _readable(place, info.name))
        raise ShardError(
            f"{place.path(info.name)} {'is cut short' if size < info.bytes else 'was replaced'}: {found:,} samples in "
            f"{size:,} bytes found, the index says {info.samples:,} in {info.bytes:,}; {_remedy(place)}"
        )


def _readable(place: Location, name: str) -> Iterator[dict[str, Any]]:
    with place.open(name) as file:
        try:
            yield from stream_samples(HashingStream(file), name)
        except ShardError:
            return


def _read_raw(place: Location, info: ShardInfo) -> Iterator[tuple[int, dict[str, Any]]]:
    count = 0
    with place.open(info.name) as file:
        stream = HashingStream(file)
        fault = ""
        samples = stream_samples(stream, place.path(info.name))
        try:
            while count < info.samples and (sample := next(samples, None)) is not None:
                yield count, sample
                count += 1
        except ShardError as error:
            fault = f" ({error})"
        path, remedy = place.path(info.name), _remedy(place)
        if count < info.samples:
            counts = f"{count:,} readable samples where the index says {info.samples:,}"
            raise ShardError(f"{path} holds {counts}{fault}: {remedy}")
        if stream.drain() != info.fingerprint:
            counts = f"its {count:,} samples in {stream.bytes:,} bytes have another fingerprint"
            raise ShardError(f"{path} is not the tar that was indexed: {counts}; {remedy}")


def _remedy(place: Location) -> str:
    return f"restore it, or index anew with `codec-dist shards index {place}`"


def _map_in_threads(
    decode: Callable[[tuple[int, dict[str, Any]]], Decoded], items: Iterable[tuple[int, dict[str, Any]]], threads: int
) -> Iterator[Decoded]:
    """``map`` on a pool of threads: order is kept, and at most two items per thread wait."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: deque[Future[Decoded]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(decode, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(position: int, members: dict[str, Any], image_fields: Sequence[str], label_field: str) -> Decoded:
    key = members["__key__"]
    label, fault = read_label(members, label_field)
    if fault is not None:
        return Decoded(key, position, None, None, fault)
    content = next((members[extension] for extension in image_fields if extension in members), None)
    if content is None:
        found = ", ".join(f".{name}" for name in members if not name.startswith("__"))
        fault = f"there is no image: expected one of {', '.join(image_fields)}, found {found}"
        return Decoded(key, position, label, None, fault)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return Decoded(key, position, label, image, None)
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever a broken file makes them trip over
        fault = f"the image cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
        return Decoded(key, position, label, None, fault)
