"""Baselines: the input x₀ at which the path of integrated gradients begins (docs/method.md §2.4)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codec_dist.attribution.data_statistics import DataStatistics
from codec_dist.attribution.errors import AttributionError
from codec_dist.utils import Registry

Images = Float[Tensor, "batch ..."]
Image = Float[Tensor, "..."]
Starts = Float[Tensor, "starts ..."]


class Baseline(ABC):
    """Where paths begin, in normalised input values."""

    same_for_all: ClassVar[bool] = True
    """Whether all images share one baseline, so that the model is run there once."""
    needs_statistics: ClassVar[bool] = False
    """Whether it must be fitted to a data set first."""

    @abstractmethod
    def start(self, images: Images) -> Starts:
        """x₀ on the images' device: one sample if it is the same for all, else shaped like ``images``."""

    def fitted(self, statistics: DataStatistics) -> "Baseline":
        """The baseline with what it needs of a data set; itself if that is nothing."""
        del statistics
        return self


BASELINES: Registry[Baseline] = Registry("baseline", AttributionError)


@BASELINES.register("zeros")
@dataclass(frozen=True)
class Zeros(Baseline):
    """Zero after normalisation: the image of the mean colour (the paper's choice)."""

    def start(self, images: Images) -> Starts:
        """One image of zeros."""
        return torch.zeros_like(images[:1])


@BASELINES.register("constant")
@dataclass(frozen=True)
class Constant(Baseline):
    """One value everywhere, or one per colour channel, after normalisation.

    Args:
        value: a number, or a list with one number per channel (the first dimension of an image).
    """

    value: float | Sequence[float]

    def __post_init__(self) -> None:
        values = self.value if isinstance(self.value, list | tuple) else [self.value]
        if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise AttributionError(f"baseline constant: value is {self.value!r}: give a number, or one per channel")

    def start(self, images: Images) -> Starts:
        """One image of that value."""
        if isinstance(self.value, int | float):
            return torch.full_like(images[:1], self.value)
        if images.shape[1] != len(self.value):
            raise AttributionError(
                f"baseline constant: {len(self.value)} values for images of {images.shape[1]} channels"
            )
        values = torch.tensor(self.value, dtype=images.dtype, device=images.device)
        return values.reshape(1, -1, *[1] * (images.ndim - 2)).expand_as(images[:1])


@BASELINES.register("image")
@dataclass(frozen=True, eq=False)
class GivenImage(Baseline):
    """A given input.

    Args:
        values: a tensor shaped like one image, normalised; or
        file: a safetensors file that holds one such tensor.
    """

    values: Image | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.file is None):
            raise AttributionError("baseline image: give either values (a tensor) or file (a safetensors file)")
        if self.file is not None:
            object.__setattr__(self, "values", _only_tensor(Path(self.file)))

    def start(self, images: Images) -> Starts:
        """The given image."""
        assert self.values is not None
        if self.values.shape != images.shape[1:]:
            found, needed = list(self.values.shape), list(images.shape[1:])
            raise AttributionError(f"integrated_gradients: the baseline is {found}, the images are {needed}")
        return self.values.to(images)[None]


@BASELINES.register("blur")
@dataclass(frozen=True)
class Blur(Baseline):
    """Each image, blurred with a Gaussian: keeps its colours and loses its shapes.

    The image continues beyond its edges as in a mirror.

    Args:
        sigma: standard deviation in pixels.
    """

    sigma: float = 10.0

    same_for_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.sigma, int | float) or isinstance(self.sigma, bool) or not self.sigma > 0:
            raise AttributionError(f"baseline blur: sigma is {self.sigma!r}: it must be above 0 pixels")

    def start(self, images: Images) -> Starts:
        """The images blurred along height and width."""
        if images.ndim != 4:
            raise AttributionError(f"baseline blur needs images [batch, channels, height, width]: {list(images.shape)}")
        for dimension in (2, 3):
            matrix = _blur_matrix(images.shape[dimension], self.sigma).to(images)
            images = torch.tensordot(images, matrix, dims=([dimension], [1])).movedim(-1, dimension)
        return images


@BASELINES.register("mean")
@dataclass(frozen=True, eq=False)
class MeanImage(Baseline):
    """The mean image of a data set; :meth:`fitted` takes it from the statistics of one.

    Args:
        values: the mean, shaped like one normalised image.
    """

    values: Image | None = None

    needs_statistics: ClassVar[bool] = True

    def fitted(self, statistics: DataStatistics) -> "Baseline":
        """With the mean image of ``statistics``."""
        return replace(self, values=statistics.mean_image)

    def start(self, images: Images) -> Starts:
        """The mean image."""
        if self.values is None:
            raise AttributionError("baseline mean: no data set was given: call method.fitted(statistics) before")
        return GivenImage(self.values).start(images)


def as_baseline(value: object) -> Baseline:
    """A baseline from what a user or a config gives: a name, a tensor, {name, options}, or a baseline.

    Raises:
        AttributionError: it is none of these, or the registry refuses it.
    """
    if isinstance(value, Baseline):
        return value
    if isinstance(value, Tensor):
        return GivenImage(value)
    if (built := BASELINES.build_choice(value)) is not None:
        return built
    raise AttributionError(f"bad baseline {value!r}: give a name, a tensor, or {{name: ..., options: {{...}}}}")


def _only_tensor(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AttributionError(f"baseline image: cannot read the safetensors file {path}: {error}") from error
    if len(tensors) != 1:
        raise AttributionError(f"baseline image: {path} holds {len(tensors)} tensors, one is needed")
    return next(iter(tensors.values()))


def _blur_matrix(size: int, sigma: float) -> Float[Tensor, "size size"]:
    """Row p holds the weights that pixel p gives to every pixel, mirrored at the edges, adding up to 1."""
    reach = max(1, round(4 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    period = max(1, 2 * (size - 1))
    places = (torch.arange(size)[:, None] + offsets.long()[None]) % period
    places = torch.where(places >= size, period - places, places)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, places, weights.expand(size, -1).contiguous())
