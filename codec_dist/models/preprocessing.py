"""From an image to the model's input, as the evaluation transforms of torchvision and timm do it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from codec_dist.models.errors import ModelError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPS = ("center", "squash", "border")
# Pixels, as many as Pillow decodes without a warning.
LARGEST_IMAGE = 89_478_485


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the center, scale to [0, 1], normalise each channel.

    Attributes:
        size: height and width of the result in pixels: one number, or the two.
        resize: size before the crop in pixels, as ``crop`` says: one number, or height and width.
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``box``, ``hamming`` or ``lanczos``.
        channels: 1 (grey) or 3 (RGB).
        mean, std: per channel, for values in [0, 1].
        crop: the modes of timm. ``center``: the shorter side becomes ``resize`` (of two numbers: the image is
            made just large enough to cover both), and the center is cut out. ``squash``: both sides become
            ``resize``, whatever the image's proportions. ``border``: the image is made just small enough to lie
            within ``resize``, and is set on the mean colour.

    Raises:
        ModelError: the settings contradict each other.
    """

    size: int | tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: str = "center"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("interpolation", self.interpolation, tuple(INTERPOLATIONS)),
            ("crop", self.crop, CROPS),
        ):
            if value not in known:
                raise ModelError(f"preprocessing: the {name} {value!r} is not known: use {', '.join(known)}")
        if self.channels not in (1, 3):
            raise ModelError(f"preprocessing: {self.channels} channels are requested: images have 1 (grey) or 3 (RGB)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ModelError(f"preprocessing: {name} has {len(values)} values for {self.channels} channels")
        if min(*_pair(self.size), *_pair(self.resize)) < 1 or min(self.std) <= 0:
            raise ModelError("preprocessing: size, resize and std must be above 0")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the result."""
        return (self.channels, *_pair(self.size))

    def __call__(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        """The normalised float32 input [channels, height, width] for one image of any mode.

        Raises:
            ModelError: the image is so long and thin that it would be resized to more pixels than fit into memory.
        """
        return self.normalise([self.pixels(image)])[0].contiguous()

    def pixels(self, image: Image.Image) -> bytes:
        """One image of any mode resized and cropped: a byte for each of its [height, width, channels] values.

        Raises:
            ModelError: as for a call.
        """
        return self._crop(self._resize(_in_colours(image, self.channels))).tobytes()

    def normalise(self, pixels: Sequence[bytes]) -> Float[Tensor, "batch channel height width"]:
        """The inputs for many images, given as :meth:`pixels` gives them; each is what a call gives for it alone.

        In memory the channels of a pixel lie together (``torch.channels_last``), as in the images. A few operations
        for all images together take a tenth of the time that they take for one image after the other.
        """
        _, height, width = self.shape
        rows = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8).view(len(pixels) * height, -1)
        # Whole rows of pixels, so that what is done to each channel is done along long stretches of memory.
        mean, std = (torch.tensor(values, dtype=torch.float32).repeat(width) for values in (self.mean, self.std))
        scaled = rows.to(torch.float32).div_(255).sub_(mean).div_(std)
        if self.channels == 1:
            return scaled.view(len(pixels), 1, height, width)
        return scaled.view(len(pixels), height, width, self.channels).permute(0, 3, 1, 2)

    def denormalise(
        self, images: Float[Tensor, "*batch channel height width"]
    ) -> Float[Tensor, "*batch channel height width"]:
        """Undo the normalisation: colour values in [0, 1], for showing images."""
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; the default crop is left out."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if (name, value) != ("crop", "center")}

    def __str__(self) -> str:
        """The settings in words, for people."""
        height, width = _pair(self.size)
        target = "{} x {}".format(*_pair(self.resize))
        resized = {
            "center": f"shorter side {self.resize}" if isinstance(self.resize, int) else f"covering {target}",
            "squash": f"squashed to {target}",
            "border": f"within {target}, borders of the mean colour",
        }[self.crop]
        colours = "grey" if self.channels == 1 else "RGB"
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{resized} ({self.interpolation}), center {height} x {width}, {colours}, mean {mean}, std {std}"

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.mean)[:, None, None], like.new_tensor(self.std)[:, None, None]

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = self._resized(*image.size)
        if width * height > LARGEST_IMAGE:
            raise ModelError(
                f"preprocessing: {image.width:,} × {image.height:,} pixels would be resized to {width * height:,} "
                f"pixels, more than {LARGEST_IMAGE:,}"
            )
        return image if image.size == (width, height) else image.resize((width, height), self._filter)

    @property
    def _filter(self) -> Image.Resampling:
        return INTERPOLATIONS[self.interpolation]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the crop, rounded as torchvision (one number) and timm (two) do."""
        rows, columns = _pair(self.resize)
        if self.crop == "squash":
            return columns, rows
        if self.crop == "center" and rows == columns:
            longer = int(rows * max(width, height) / min(width, height))
            return (rows, longer) if width <= height else (longer, rows)
        ratios = height / rows, width / columns
        ratio = min(ratios) if self.crop == "center" else max(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _crop(self, image: Image.Image) -> Image.Image:
        # A smaller image is set on a colour; the odd pixel falls as in torchvision's center_crop.
        def start(length: int, wanted: int) -> int:
            return round((length - wanted) / 2) if length >= wanted else -((wanted - length) // 2)

        height, width = _pair(self.size)
        if image.size == (width, height):
            return image
        left, top = start(image.width, width), start(image.height, height)
        if self.crop != "border":
            return image.crop((left, top, left + width, top + height))
        colour = tuple(round(255 * value) for value in self.mean)
        canvas = Image.new(image.mode, (width, height), colour if self.channels == 3 else colour[0])
        canvas.paste(image, (-left, -top))
        return canvas


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (value, value) if isinstance(value, int) else value


def _in_colours(image: Image.Image, channels: int) -> Image.Image:
    """RGB as torchvision's loader of image folders makes it, and grey as its ``Grayscale`` does of that.

    So alpha is dropped, palettes are looked up, 16-bit grey is clipped at 255, and EXIF rotations are not applied.
    """
    if image.mode == ("RGB" if channels == 3 else "L"):
        return image
    colours = image.convert("RGB")
    return colours if channels == 3 else colours.convert("L")
