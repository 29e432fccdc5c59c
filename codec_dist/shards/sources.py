"""Images to pack: the built-in digits, and folders with one subfolder per class."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from codec_dist.shards.errors import ShardError
from codec_dist.shards.packing import Sample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def digits() -> tuple[Iterator[Sample], list[str]]:
    """Scikit-learn's 1,797 handwritten digits: 8×8 grey PNG, values 0..16 scaled to 0..255; classes "0" to "9"."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)

    def samples() -> Iterator[Sample]:
        for number, (image, label) in enumerate(zip(pixels, bundle.target)):
            content = io.BytesIO()
            # Uncompressed, so that the bytes do not depend on the version of zlib.
            Image.fromarray(image).save(content, format="PNG", compress_level=0)
            yield Sample(f"digit-{number:06d}", content.getvalue(), "png", int(label))

    return samples(), [str(label) for label in bundle.target_names]


def image_folder(path: str | Path) -> tuple[Iterator[Sample], list[str]]:
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
    folders = [entry for entry in visible if entry.is_dir()]
    loose = [entry for entry in visible if _is_image(entry)]
    if folders and loose:
        raise ShardError(
            f"{root} holds images beside class folders, first {loose[0].name}: move them into a class folder"
        )
    if not folders and not loose:
        raise ShardError(f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)}) and no class folders")
    images = {folder.name: list(_images_below(folder)) for folder in folders}
    for name, found in images.items():
        if not found:
            raise ShardError(
                f"the class folder {root / name} holds no images ({', '.join(IMAGE_EXTENSIONS)}): fill or remove it"
            )

    def samples() -> Iterator[Sample]:
        for image in loose:
            yield _sample(image, root, None)
        for label, found in enumerate(images.values()):
            for image in found:
                yield _sample(image, root, label)

    return samples(), list(images)


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (path for path in (Path(parent, name) for name in sorted(files)) if _is_image(path))


def _is_image(path: Path) -> bool:
    is_named_so = path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    return is_named_so and path.is_file()


def _sample(image: Path, root: Path, label: int | None) -> Sample:
    key = image.relative_to(root).with_suffix("").as_posix().replace("%", "%25").replace(".", "%2E")
    return Sample(key, image.read_bytes(), image.suffix[1:].lower(), label)
