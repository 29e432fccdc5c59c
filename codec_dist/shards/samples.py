"""What a source of images gives to packing."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from codec_dist.shards.errors import ShardError
from codec_dist.shards.labels import LARGEST_LABEL
from codec_dist.shards.tally import Tally

UNENCODED = re.compile(r"[^%.\\]*")


@dataclass(frozen=True, slots=True)
class Sample:
    """An encoded image and its label on the way into a shard."""

    key: str
    """Unique in the data set; without dots, which end a key in WebDataset."""
    image: bytes
    extension: str
    """Format of the image: jpg, png, webp, ..."""
    label: int | None


@runtime_checkable
class AddressableSource(Protocol):
    """A source whose samples can be had by number in any order: packing it needs no copy of the images."""

    def __len__(self) -> int:
        """Number of samples; they are numbered from 0."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """The samples by number."""
        ...

    def keys(self) -> Iterable[str]:
        """The keys by number."""
        ...

    def read(self, numbers: Sequence[int]) -> Iterable[Sample]:
        """The samples of these numbers, in this order; those that turn out to be no images are left out."""
        ...


@runtime_checkable
class CountedSource(Protocol):
    """A source that tells what it leaves out; both tallies are complete once all samples were read."""

    left_out: Tally
    """Files or rows that are not packed, by reason."""
    changed: Tally
    """Images that are not packed byte by byte, by what was done to them."""
    notes: list[str]
    """What the user should know of the labels."""


def file_key(path: str) -> str:
    """The key of a file: its path, percent-encoded where a key cannot hold it.

    Encoded are dots, percent signs, backslashes, what cannot be printed (control characters, all spaces but the plain
    one), bytes that are not UTF-8, and the first of two underscores that begin the path. Different paths have different
    keys; ``urllib.parse.unquote_to_bytes`` gives the path back.
    """
    if path.isprintable() and not path.startswith("__") and UNENCODED.fullmatch(path):
        return path  # as nearly all are
    encoded = "".join(each if each.isprintable() and each not in "%.\\" else _percent(each) for each in path)
    return f"%5F{encoded[1:]}" if encoded.startswith("__") else encoded


def check_key(key: str) -> None:
    """Refuse a key that WebDataset's readers would not give back.

    Raises:
        ShardError: it is empty, holds dots or unprintable characters, or is not a path of names.
    """
    names = key.split("/")
    if not key.isprintable() or "." in key or "\\" in key or "" in names or names[0].startswith("__"):
        raise ShardError(f"the key {key!r} cannot be used: expected printable text without dots, e.g. cat/photo-1")


def check_sample(sample: Sample, classes: int | None) -> None:
    """Refuse an extension or a label that cannot be packed.

    Args:
        sample: the sample.
        classes: number of classes, None if the data set names none.

    Raises:
        ShardError: the extension is not that of an image, or the label is out of range.
    """
    label = sample.label
    if not re.fullmatch(r"[A-Za-z0-9]+", sample.extension) or sample.extension.lower() in ("cls", "json"):
        raise ShardError(
            f"the extension {sample.extension!r} of {sample.key!r} is not that of an image: expected png, jpg, ..."
        )
    if label is not None and not 0 <= label < (classes or LARGEST_LABEL + 1):
        known = f"0 to {classes - 1} (classes)" if classes else "integers from 0"
        raise ShardError(f"the label {label} of {sample.key!r} is out of range: expected {known}")


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
