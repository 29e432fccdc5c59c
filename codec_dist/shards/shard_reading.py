"""Reading one shard: a stream of decoded images in the order of the tar, checked against the index."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from codec_dist.shards.decoding import Decoded, Decoder
from codec_dist.shards.errors import DamagedTarError, ShardError
from codec_dist.shards.index_files import how_to_index
from codec_dist.shards.location import Location
from codec_dist.shards.retries import Retries
from codec_dist.shards.scanning import ShardInfo
from codec_dist.shards.streams import HashingStream, RawSample, dotted_fields, stream_samples

# Position, sample, and a fault that the index knows.
Item = tuple[int, RawSample, str | None]


def read_shard(
    location: str | Path,
    info: ShardInfo,
    *,
    image_fields: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
    label_field: str = "cls",
    threads: int = 1,
    keys: Collection[str] | None = None,
    classes: int | None = None,
    retries: Retries | None = None,
) -> Iterator[Decoded]:
    """Decode the samples of a shard, in the order of the tar.

    A sample that cannot be used (docs/formats.md lists the faults) is an item with ``error``, not an exception.
    With ``threads`` > 1 decoding runs ahead by at most two images per thread. After the last sample the
    shard's fingerprint is compared with the index.

    Args:
        location: folder or URL of the shards.
        info: the shard's entry in the index; its first ``info.samples`` samples are read.
        image_fields: extensions that hold an image; a sample with several of them is a fault.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        threads: threads that decode.
        keys: decode and yield only the samples with these keys; default: all.
        classes: labels from this number on are faults, too (those beyond classes.json are in any case).
        retries: patience with a remote source; a connection that breaks is resumed where it broke.

    Raises:
        ShardError: the tar is missing, cut short, damaged or another than the indexed one, with the counts
            found. It is raised while iterating: what was yielded before it must be discarded.
    """
    place = Location(location, retries)
    _check_size(place, info)
    decoder = Decoder(tuple(dict.fromkeys(each.lower() for each in image_fields)), label_field, classes)
    items = _read_items(place, info, decoder.wanted, dotted_fields(image_fields))
    if keys is not None:
        chosen = frozenset(keys)
        items = (item for item in items if item[1].key in chosen)

    def decode(item: Item) -> Decoded:
        return decoder(*item)

    yield from map(decode, items) if threads <= 1 else _map_in_threads(decode, items, threads)


def _check_size(place: Location, info: ShardInfo) -> None:
    """Refuse a tar of another size before anything is computed from it."""
    size = place.size(info.name)
    if size is not None and size != info.bytes:
        found = _readable(place, info.name, size)
        raise ShardError(
            f"{place.path(info.name)} {'is cut short' if size < info.bytes else 'was replaced'}: {found:,} samples in "
            f"{size:,} bytes found, the index says {info.samples:,} in {info.bytes:,}; {_remedy(place)}"
        )


def _readable(place: Location, name: str, size: int) -> int:
    count = 0
    with place.open(name, size) as file:
        try:
            for _ in stream_samples(file, name, wanted=()):
                count += 1
        except DamagedTarError:
            pass
    return count


def _read_items(
    place: Location, info: ShardInfo, wanted: Collection[str], image_fields: Collection[str]
) -> Iterator[Item]:
    count, fault = 0, ""
    known = dict(info.faults)
    path, remedy = place.path(info.name), _remedy(place)
    with place.open(info.name, info.bytes) as file:
        stream = HashingStream(file)
        samples = stream_samples(stream, path, wanted, image_fields)
        try:
            while count < info.samples and (sample := next(samples, None)) is not None:
                yield count, sample, known.get(count)
                count += 1
        except DamagedTarError as error:
            fault = f" ({error})"
        if count < info.samples:
            counts = f"{count:,} readable samples where the index says {info.samples:,}"
            raise ShardError(f"{path} holds {counts}{fault}: {remedy}")
        if stream.drain() != info.fingerprint:
            counts = f"its {count:,} samples in {stream.bytes:,} bytes have another fingerprint"
            raise ShardError(f"{path} is not the tar that was indexed: {counts}; {remedy}")


def _remedy(place: Location) -> str:
    return f"restore it, or {how_to_index(place)}"


def _map_in_threads(decode: Callable[[Item], Decoded], items: Iterable[Item], threads: int) -> Iterator[Decoded]:
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
