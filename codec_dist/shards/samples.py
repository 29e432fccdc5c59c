"""What a source of images gives to packing: samples and their labels; and sources that are in memory."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.tally import Tally

UNENCODED = re.compile(r"[^%.\\]*")

LARGEST_LABEL = 2**31 - 1


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


# ---- Labels of samples: an integer member, or a field of the JSON member


def read_label(members: Mapping[str, bytes], label_field: str) -> tuple[int | None, str | None]:
    """Label of a sample, and what is wrong with it.

    Args:
        members: extension → bytes of the sample's members.
        label_field: an extension such as ``cls``, or ``json:FIELD``.

    Returns:
        (label, None), (None, None) for a sample without label, or (None, problem).
    """
    extension, _, field = label_field.partition(":")
    content = members.get(extension.lower())
    if content is None:
        return None, None
    if field:
        return _from_json(bytes(content), field)
    text = bytes(content).strip()
    if not text.isdigit() or len(text) > 10 or int(text) > LARGEST_LABEL:
        return None, f"the label {text[:40].decode(errors='replace')!r} in .{extension} is not an integer from 0"
    return int(text), None


def _from_json(content: bytes, field: str) -> tuple[int | None, str | None]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, f"the .json member is not JSON: {error}"
    if not isinstance(values, dict):
        return None, "the .json member is not an object"
    label = values.get(field)
    if label is None:
        return None, None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= LARGEST_LABEL:
        return None, f"the label {str(label)[:40]!r} in field {field!r} of .json is not an integer from 0"
    return label, None


# ---- Images to pack that are in memory, such as the built-in digits


def digits() -> tuple["HeldSamples", list[str]]:
    """Scikit-learn's 1,797 handwritten digits: 8×8 grey PNG, values 0..16 scaled to 0..255; classes "0" to "9"."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    samples = []
    for number, (image, label) in enumerate(zip(pixels, bundle.target)):
        content = io.BytesIO()
        # Uncompressed, so that the bytes do not depend on the version of zlib.
        Image.fromarray(image).save(content, format="PNG", compress_level=0)
        samples.append(Sample(f"digit-{number:06d}", content.getvalue(), "png", int(label)))
    return HeldSamples(samples), [str(label) for label in bundle.target_names]


class HeldSamples:
    """Samples that are in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def keys(self) -> Iterator[str]:
        return (sample.key for sample in self._samples)

    def read(self, numbers: Sequence[int]) -> list[Sample]:
        return [self._samples[number] for number in numbers]
