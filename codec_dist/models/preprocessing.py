"""From an image to the model's input, as torchvision's reference evaluation transform does it."""

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
}
# Pixels, as many as Pillow decodes without a warning.
LARGEST_IMAGE = 89_478_485


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the center, scale to [0, 1], normalise each channel.

    Attributes:
        size: height and width of the result, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic``.
        channels: 1 (grey) or 3 (RGB).
        mean, std: per channel, for values in [0, 1].

    Raises:
        ModelError: the settings contradict each other.
    """

    size: int
    resize: int
    interpolation: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ModelError(f"preprocessing: the interpolation {self.interpolation!r} is not known: use {known}")
        if self.channels not in (1, 3):
            raise ModelError(f"preprocessing: {self.channels} channels are asked: images have 1 (grey) or 3 (RGB)")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ModelError(f"preprocessing: {name} has {len(values)} values for {self.channels} channels")
        if min(self.size, self.resize) < 1 or min(self.std) <= 0:
            raise ModelError("preprocessing: size, resize and std must be above 0")

    def __call__(self, image: Image.Image) -> Float[Tensor, "channel height width"]:
        """The normalised float32 input [channels, size, size] for one image of any mode.

        Raises:
            ModelError: the image is so long and thin that it would be resized to more pixels than fit into memory.
        """
        return self.normalise([self.pixels(image)])[0].contiguous()

    def pixels(self, image: Image.Image) -> bytes:
        """One image of any mode resized and cropped: a byte for each of its [size, size, channels] values.

        Raises:
            ModelError: as for a call.
        """
        return self._crop(self._resize(_in_colours(image, self.channels))).tobytes()

    def normalise(self, pixels: Sequence[bytes]) -> Float[Tensor, "batch channel height width"]:
        """The inputs for many images, given as :meth:`pixels` gives them; each is what a call gives for it alone.

        In memory the channels of a pixel lie together (``torch.channels_last``), as in the images. A few operations
        for all images together take a tenth of the time that they take for one image after the other.
        """
        rows = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8).view(len(pixels) * self.size, -1)
        # Whole rows of pixels, so that what is done to each channel is done along long stretches of memory.
        mean, std = (torch.tensor(values, dtype=torch.float32).repeat(self.size) for values in (self.mean, self.std))
        scaled = rows.to(torch.float32).div_(255).sub_(mean).div_(std)
        if self.channels == 1:
            return scaled.view(len(pixels), 1, self.size, self.size)
        return scaled.view(len(pixels), self.size, self.size, self.channels).permute(0, 3, 1, 2)

    def denormalise(
        self, images: Float[Tensor, "*batch channel height width"]
    ) -> Float[Tensor, "*batch channel height width"]:
        """Undo the normalisation: colour values in [0, 1], for showing images."""
        mean, std = self._statistics(images)
        return (images * std + mean).clamp(0, 1)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.mean)[:, None, None], like.new_tensor(self.std)[:, None, None]

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longer = int(self.resize * max(width, height) / min(width, height))
        if self.resize * longer > LARGEST_IMAGE:
            raise ModelError(
                f"preprocessing: {width:,} × {height:,} pixels would be resized to {self.resize * longer:,} pixels, "
                f"more than {LARGEST_IMAGE:,}"
            )
        target = (self.resize, longer) if width <= height else (longer, self.resize)
        return image if image.size == target else image.resize(target, INTERPOLATIONS[self.interpolation])

    def _crop(self, image: Image.Image) -> Image.Image:
        # A smaller image is set on black; the odd pixel falls as in torchvision's center_crop.
        def start(length: int) -> int:
            return round((length - self.size) / 2) if length >= self.size else -((self.size - length) // 2)

        if image.size == (self.size, self.size):
            return image
        left, top = start(image.width), start(image.height)
        return image.crop((left, top, left + self.size, top + self.size))


def _in_colours(image: Image.Image, channels: int) -> Image.Image:
    """RGB as torchvision's loader of image folders makes it, and grey as its ``Grayscale`` does of that.

    So alpha is dropped, palettes are looked up, 16-bit grey is clipped at 255, and EXIF rotations are not applied.
    """
    if image.mode == ("RGB" if channels == 3 else "L"):
        return image
    colours = image.convert("RGB")
    return colours if channels == 3 else colours.convert("L")
