"""Photographs for a real ImageNet network: 20 of ImageNet, and photographs of objects on random backgrounds.

Both come from packages: foolbox ships 20 photographs of ImageNet's validation set with their classes in their file
names, and Debian's `tuxpaint-stamps-default` ships stamps, which are photographs (and drawings) of objects that were
cut out, on a transparent background. Drawings are left out by their folders and by how few colours they have.
"""

import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from codec_dist.utils import CodecError

REQUIREMENTS = "install benchmarks/requirements.txt: pip install --no-deps -r benchmarks/requirements.txt"
STAMPS = Path("/usr/share/tuxpaint/stamps")
HOW_TO_GET_STAMPS = (
    "install them by `apt-get install tuxpaint-stamps-default`, or unpack the package without installing it: "
    "`apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb FOLDER`, and give "
    "--stamps FOLDER/usr/share/tuxpaint/stamps"
)
# Folders of drawings, and the least number of distinct colours (5 bits per channel), divided by the square root of the
# opaque pixels, that photographs have: found by looking at all stamps in the order of this ratio.
DRAWINGS = {"symbols", "cartoon"}
COLOURS, OPAQUE = 2.0, 128
SMALLEST, FULLNESS = 64, 0.15
"""Pixels of a stamp's longer side, and opaque fraction of the rectangle around it, at least."""
LARGEST_SCALE = 2.5
"""How many times a stamp is enlarged at most."""
SHARES = (0.7, 1.0)
"""Range of the longer side of a stamp as a fraction of the picture's side."""


class MissingError(CodecError):
    """Weights or photographs that are not on this machine, and how to get them."""


class Photograph(NamedTuple):
    """A photograph of ImageNet's validation set."""

    name: str
    image: Image.Image
    label: int
    """The number of its class, 0 to 999."""


def imagenet_photographs() -> list[Photograph]:
    """The 20 photographs of ImageNet that foolbox ships, 512 x 512 pixels, in the order of their names.

    Raises:
        MissingError: foolbox is not installed, or ships other files.
    """
    found = [path for path in files_of("foolbox") if path.name.startswith("imagenet_") and path.suffix == ".jpg"]
    if len(found) != 20:
        raise MissingError(f"foolbox ships {len(found)} photographs of ImageNet, 20 were expected: {REQUIREMENTS}")
    ordered = sorted(found, key=lambda path: path.name)
    return [Photograph(path.stem, Image.open(path).convert("RGB"), int(path.stem.split("_")[2])) for path in ordered]


class Stamps:
    """Photographs of objects, each composed on a random background: an endless sequence, given by its seed.

    Picture ``i`` depends on the stamps, ``side``, ``seed`` and ``i`` alone. Each pass over the stamps takes all of them
    once in a new order.

    Args:
        folder: an installed or unpacked folder of stamps.
        side: height and width of the pictures in pixels.
        visible: side of the central square in which the stamp lies, in pixels.
        seed: of order, size, place, mirroring and background.

    Raises:
        MissingError: no stamps of photographs in the folder.
    """

    def __init__(self, folder: Path, side: int, visible: int, seed: int = 0) -> None:
        self.paths = stamp_photographs(folder)
        self._folder, self._side, self._visible, self._seed = folder, side, visible, seed

    def name(self, number: int) -> str:
        """The stamp of a picture, as its path below the folder without suffix."""
        return self._path(number).relative_to(self._folder).with_suffix("").as_posix()

    def picture(self, number: int) -> Image.Image:
        """One picture, RGB."""
        return compose(
            Image.open(self._path(number)), self._side, self._visible, np.random.default_rng([self._seed, 1, number])
        )

    def _path(self, number: int) -> Path:
        turn, place = divmod(number, len(self.paths))
        order = np.random.default_rng([self._seed, 0, turn]).permutation(len(self.paths))
        return self.paths[order[place]]


def stamp_photographs(folder: Path) -> list[Path]:
    """Stamps that are photographs, by path.

    Raises:
        MissingError: there are none, or a file is no readable picture.
    """
    paths = sorted(path for path in folder.rglob("*.png") if DRAWINGS.isdisjoint(path.relative_to(folder).parts))
    kept = [path for path in paths if _holds_photograph(path)]
    if not kept:
        raise MissingError(f"there are no photographs with a transparent background in {folder}: {HOW_TO_GET_STAMPS}")
    return kept


def is_photograph(stamp: Image.Image) -> bool:
    """Whether a stamp has as many colours as photographs have, a transparent background, and no less than 64 pixels."""
    values = np.asarray(stamp.convert("RGBA"))
    opaque = values[..., 3] >= OPAQUE
    if not opaque.any() or opaque.all():
        return False
    _, _, width, height = _box(opaque)
    if max(width, height) < SMALLEST or opaque.sum() < FULLNESS * width * height:
        return False
    red, green, blue = (values[opaque][:, :3] >> 3).astype(np.int64).T
    return len(np.unique((red * 32 + green) * 32 + blue)) >= COLOURS * math.sqrt(opaque.sum())


def _holds_photograph(path: Path) -> bool:
    try:
        with Image.open(path) as stamp:
            return is_photograph(stamp)
    except OSError as error:
        raise MissingError(f"{path} is not a readable picture: give the folder of the stamps alone") from error


def compose(stamp: Image.Image, side: int, visible: int, random: np.random.Generator) -> Image.Image:
    """A stamp in random size, place and orientation (mirrored or not) on a random background.

    Args:
        stamp: a picture with transparent background.
        side: height and width of the result in pixels.
        visible: side of the central square in which the whole stamp lies.
        random: source of all choices.
    """
    picture = Image.fromarray(background(side, random))
    left, top, width, height = _box(np.asarray(stamp.convert("RGBA"))[..., 3] > 0)
    cut = stamp.convert("RGBA").crop((left, top, left + width, top + height))
    if random.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = min(random.uniform(*SHARES) * visible / max(width, height), LARGEST_SCALE)
    width, height = (max(1, round(length * scale)) for length in (width, height))
    cut = cut.resize((width, height), Image.Resampling.LANCZOS)
    margin = (side - visible) // 2
    place = [margin + int(random.integers(0, visible - length + 1)) for length in (width, height)]
    picture.paste(cut, (place[0], place[1]), cut)
    return picture


def background(side: int, random: np.random.Generator) -> np.ndarray:
    """A gradient of two colours and, half of the time, noise whose coarse octaves are the strongest.

    Returns:
        uint8 [side, side, 3].
    """
    first, second = (_colour(random) for _ in range(2))
    angle = random.uniform(0, 2 * math.pi)
    along = np.linspace(-0.5, 0.5, side)
    position = 0.5 + (along[:, None] * math.sin(angle) + along[None, :] * math.cos(angle)) / math.sqrt(2)
    values = first + (second - first) * position[..., None]
    if random.random() < 0.5:
        strength = random.uniform(10, 40)
        for octave in range(1, 6):
            cells = random.normal(size=(2**octave, 2**octave, 1)) + 0.3 * random.normal(size=(2**octave, 2**octave, 3))
            values = values + _enlarged(cells * strength / octave, side)
    return values.clip(0, 255).round().astype(np.uint8)


def _colour(random: np.random.Generator) -> np.ndarray:
    """A colour as photographs have them: any brightness, little saturation."""
    return random.uniform(30, 225) + random.uniform(-40, 40, 3)


def _enlarged(cells: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(cells[..., channel].astype(np.float32)) for channel in range(cells.shape[-1])]
    return np.stack([np.asarray(each.resize((side, side), Image.Resampling.BICUBIC)) for each in channels], axis=-1)


def _box(opaque: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width and height of what is true."""
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def files_of(package: str) -> Sequence[Path]:
    """Files that a package has installed; it is not imported, because that needs what it depends on."""
    try:
        return [Path(str(path.locate())) for path in files(package) or []]
    except PackageNotFoundError as error:
        raise MissingError(f"{package} is not installed: {REQUIREMENTS}") from error
