"""Images to pack: the built-in digits, and folders with one subfolder per class."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.samples import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


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


def image_folder(path: str | Path) -> tuple["ImageFiles", list[str]]:
    """Images (jpg, jpeg, png, webp) of a folder whose subfolders are the classes, in the order of names.

    Folders inside a class belong to it. A folder that holds images and no subfolders is unlabelled and has
    no classes. Keys are paths without extension; dots and percent signs in them are percent-encoded.

    Raises:
        ShardError: no such folder, images beside the class folders, or a class without images.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ShardError(f"cannot read images from {root}: there is no such folder")
    visible = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    folders = [entry.name for entry in visible if entry.is_dir()]
    loose = [entry.name for entry in visible if is_image_name(entry.name) and entry.is_file()]
    if folders and loose:
        raise ShardError(f"{root} holds images beside class folders, first {loose[0]}: move them into a class folder")
    if not folders and not loose:
        raise ShardError(f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)}) and no class folders")
    images: list[tuple[str, int | None]] = [(name, None) for name in loose]
    for label, name in enumerate(folders):
        found = [(image, label) for image in _images_below(root, name)]
        if not found:
            raise ShardError(
                f"the class folder {root / name} holds no images ({', '.join(IMAGE_EXTENSIONS)}): fill or remove it"
            )
        images += found
    return ImageFiles(root, images), folders


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


class ImageFiles:
    """Files below a folder, by their relative paths; each is read when it is asked for."""

    def __init__(self, root: Path, images: Sequence[tuple[str, int | None]]) -> None:
        self._root, self._images = root, images

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.read(range(len(self))))

    def keys(self) -> Iterator[str]:
        return (path_key(path) for path, _ in self._images)

    def read(self, numbers: Iterable[int]) -> Iterator[Sample]:
        for number in numbers:
            path, label = self._images[number]
            extension = path.rpartition(".")[2].lower()
            yield Sample(path_key(path), (self._root / path).read_bytes(), extension, label)


def path_key(path: str) -> str:
    """The key of a file: its path without the extension, dots and percent signs percent-encoded."""
    return os.path.splitext(path)[0].replace("%", "%25").replace(".", "%2E")


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and "." in name and not name.startswith(".")


def _images_below(root: Path, name: str) -> Iterator[str]:
    for parent, subfolders, files in os.walk(root / name, followlinks=True):
        subfolders[:] = sorted(each for each in subfolders if not each.startswith("."))
        folder = Path(parent).relative_to(root).as_posix()
        yield from (
            f"{folder}/{each}" for each in sorted(files) if is_image_name(each) and Path(parent, each).is_file()
        )
