"""Which files are images, and how an image gets into a shard: as it is, or without loss as PNG."""

import functools
import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.shard_reading import LARGEST_IMAGE, OUT_OF_MEMORY

# Members of these extensions are read by default; files of these names are packed byte by byte, whatever they hold.
PACKED_AS_THEY_ARE = ("jpg", "jpeg", "png", "webp")
# Pillow knows these by name, but leaves them to other programs (Ghostscript, Windows), or cannot decode them at all.
NOT_DECODED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
LARGEST_16_BIT = 65535
# Fast, and half the size of no compression; the pixels are the same.
COMPRESS_LEVEL = 1


class NoImageError(ShardError):
    """Content that cannot be packed as an image; the message is the reason, without the file."""


class Member(NamedTuple):
    """An image as a shard holds it."""

    content: bytes
    extension: str
    change: str | None = None
    """What was done to an image that is not stored byte by byte."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of files that are taken for images, in lower case: of all formats that Pillow decodes by itself."""
    known = Image.registered_extensions()
    return frozenset(suffix[1:].lower() for suffix, form in known.items() if form in _formats())


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def as_member(content: bytes) -> Member:
    """An image as a member of a shard: JPEG, PNG and WebP byte by byte, others as PNG of the same pixels.

    Of animations and files of several pages it is the first picture, as torchvision takes it. Pixels lie as in the
    file (an EXIF rotation is not applied). CMYK and YCbCr become RGB by Pillow's formula, as they would when read;
    16-bit grey stays; 16-bit colours are decoded to their upper bytes.

    Raises:
        NoImageError: no image that Pillow decodes, too many pixels, or values that PNG cannot hold.
    """
    if (extension := extension_of(content)) is not None:
        return Member(content, extension)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_formats()) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise NoImageError(f"images of more than {LARGEST_IMAGE:,} pixels")
            several = bool(getattr(image, "is_animated", False))
            image.load()
            stored = _as_png_holds_it(image)
            buffer = io.BytesIO()
            stored.save(buffer, format="PNG", compress_level=COMPRESS_LEVEL)
    except (NoImageError, MemoryError):
        raise
    except Exception as error:
        if OUT_OF_MEMORY in str(error):
            raise MemoryError(f"too little memory to decode an image: {error}") from error
        raise NoImageError("files that Pillow cannot decode") from error
    change = "the first picture of several (animations, pages), as PNG" if several else "the same pixels as PNG"
    return Member(buffer.getvalue(), "png", change)


def extension_of(content: bytes) -> str | None:
    """``jpg``, ``png`` or ``webp`` by an image's first bytes; None for everything else."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "png" if content.startswith(b"\x89PNG\r\n\x1a\n") else None


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) & set(Image.registered_extensions().values()) - NOT_DECODED))


def _as_png_holds_it(image: Image.Image) -> Image.Image:
    """The image in a mode of PNG, whose conversion to RGB gives the same pixels; without metadata."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_16_bit(image)
    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        stored = image.copy()
    elif image.mode in ("La", "PA", "RGBa"):
        stored = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        stored = image.convert("RGB")
    else:
        raise NoImageError(f"images of colour mode {image.mode}, which PNG cannot hold")
    transparency = image.info.get("transparency") if stored.mode == image.mode else None
    stored.info = {} if transparency is None else {"transparency": transparency}
    return stored


def _grey_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image if image.mode in ("I", "F") else image.convert("I"))
    whole = np.isfinite(values).all() and (values == np.rint(values)).all()
    if not whole or values.min() < 0 or values.max() > LARGEST_16_BIT:
        raise NoImageError(f"grey images with values other than whole numbers from 0 to {LARGEST_16_BIT:,}")
    return Image.fromarray(values.astype(np.uint16))
