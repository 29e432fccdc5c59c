"""Reading one shard: a stream of decoded images in the order of the tar, checked against the index."""

import io
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from codec_dist.shards.errors import DamagedTarError, ShardError
from codec_dist.shards.index import how_to_index
from codec_dist.shards.location import Location, Retries
from codec_dist.shards.samples import read_label
from codec_dist.shards.scanning import ShardInfo
from codec_dist.shards.tar import HashingStream, RawSample, dotted_fields, stream_samples

# Position, sample, and a problem that the index knows.
Item = tuple[int, RawSample, str | None]

# Formats that Pillow decodes by itself; it hands some others, such as EPS, to programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# A few bytes can claim any size. Pillow itself warns from here on, and refuses twice as many.
LARGEST_IMAGE = 89_478_485
# How Pillow's decoders tell of it.
OUT_OF_MEMORY = "out of memory"


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
    classes: int | None = None,
    retries: Retries | None = None,
) -> Iterator[Decoded]:
    """Decode the samples of a shard, in the order of the tar.

    A sample that cannot be used (docs/formats.md lists the problems) is an item with ``error``, not an exception.
    With ``threads`` > 1 decoding runs ahead by at most two images per thread. After the last sample the
    shard's fingerprint is compared with the index.

    Args:
        location: folder or URL of the shards.
        info: the shard's entry in the index; its first ``info.samples`` samples are read.
        image_fields: extensions that hold an image; a sample with several of them is a problem.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        threads: threads that decode.
        keys: decode and yield only the samples with these keys; default: all.
        classes: labels from this number on are problems, too (those beyond classes.json are in any case).
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
        selected = frozenset(keys)
        items = (item for item in items if item[1].key in selected)

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
    count, problem = 0, ""
    known = dict(info.problems)
    path, remedy = place.path(info.name), _remedy(place)
    with place.open(info.name, info.bytes) as file:
        stream = HashingStream(file)
        samples = stream_samples(stream, path, wanted, image_fields)
        try:
            while count < info.samples and (sample := next(samples, None)) is not None:
                yield count, sample, known.get(count)
                count += 1
        except DamagedTarError as error:
            problem = f" ({error})"
        if count < info.samples:
            counts = f"{count:,} readable samples where the index says {info.samples:,}"
            raise ShardError(f"{path} holds {counts}{problem}: {remedy}")
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


# ---- From the members of a sample to its image and label, or to the reason why it cannot be used


@dataclass(frozen=True)
class Decoder:
    """What to take from the members of a sample.

    Attributes:
        image_fields: extensions, in lower case, that hold an image; a sample has exactly one of them.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        classes: labels from this number on are problems; default: any label is good.
    """

    image_fields: Sequence[str]
    label_field: str
    classes: int | None = None

    @property
    def wanted(self) -> frozenset[str]:
        """Extensions whose content is needed."""
        return frozenset((*self.image_fields, self.label_field.partition(":")[0].lower()))

    def __call__(self, position: int, sample: RawSample, problem: str | None = None) -> Decoded:
        """Decode one sample; ``problem``: why it cannot be used, if that is known already.

        Raises:
            MemoryError: there is too little memory for the image; nothing else is raised.
        """
        label, label_problem = read_label(sample.members, self.label_field)
        problem = problem or sample.problem or label_problem or self._label_out_of_range(label)
        if problem is not None:
            return Decoded(sample.key, position, None, None, problem)
        image, problem = self._image(sample)
        return Decoded(sample.key, position, label, image, problem)

    def _label_out_of_range(self, label: int | None) -> str | None:
        if label is None or self.classes is None or label < self.classes:
            return None
        return f"the label {label} is out of range: there are classes 0 to {self.classes - 1}"

    def _image(self, sample: RawSample) -> tuple[Image.Image | None, str | None]:
        present = [extension for extension in self.image_fields if extension in sample.members]
        if not present:
            found = ", ".join(f".{extension}" for extension in sample.members)
            dotted = any(each.rpartition(".")[2] in self.image_fields for each in sample.members)
            hint = " (an extension begins at the first dot of a file's name)" if dotted else ""
            return None, f"there is no image: expected one of {', '.join(self.image_fields)}, found {found}{hint}"
        if len(present) > 1:
            found = " and ".join(f".{extension}" for extension in present)
            return None, f"there are {len(present)} images, {found}: name the one that counts in data.image_fields"
        return decode_image(sample.members[present[0]])


def decode_image(content: bytes) -> tuple[Image.Image | None, str | None]:
    """The image in its own mode and as its pixels lie (an EXIF rotation is not applied), or why there is none.

    Raises:
        MemoryError: there is too little memory for the image.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > LARGEST_IMAGE:
                size = f"{image.width:,} × {image.height:,} pixels"
                return None, f"the image claims {size}, more than the {LARGEST_IMAGE:,} that are decoded"
            image.load()
            return image, None
    except UnidentifiedImageError:
        return None, f"the image cannot be decoded: it is not, or not whole, in any of {', '.join(FORMATS)}"
    except MemoryError:
        raise  # not an error of the image: where there is more memory it can be decoded
    except Exception as error:
        if OUT_OF_MEMORY in str(error):
            raise MemoryError(f"too little memory to decode an image: {error}") from error
        return None, f"the image cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
