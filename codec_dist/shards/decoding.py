"""From the members of a sample to its image and label, or to the reason why it cannot be used."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from codec_dist.shards.labels import read_label
from codec_dist.shards.streams import RawSample

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


@dataclass(frozen=True)
class Decoder:
    """What to take from the members of a sample.

    Attributes:
        image_fields: extensions, in lower case, that hold an image; a sample has exactly one of them.
        label_field: extension of the member with the integer label, or ``json:FIELD``.
        classes: labels from this number on are faults; default: any label is good.
    """

    image_fields: Sequence[str]
    label_field: str
    classes: int | None = None

    @property
    def wanted(self) -> frozenset[str]:
        """Extensions whose content is needed."""
        return frozenset((*self.image_fields, self.label_field.partition(":")[0].lower()))

    def __call__(self, position: int, sample: RawSample, fault: str | None = None) -> Decoded:
        """Decode one sample; ``fault``: why it cannot be used, if that is known already.

        Raises:
            MemoryError: there is too little memory for the image; nothing else is raised.
        """
        label, label_fault = read_label(sample.members, self.label_field)
        fault = fault or sample.fault or label_fault or self._label_out_of_range(label)
        if fault is not None:
            return Decoded(sample.key, position, None, None, fault)
        image, fault = self._image(sample)
        return Decoded(sample.key, position, label, image, fault)

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
        raise  # not the image's fault: where there is more memory it can be decoded
    except Exception as error:
        if OUT_OF_MEMORY in str(error):
            raise MemoryError(f"too little memory to decode an image: {error}") from error
        return None, f"the image cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}"
