"""What some targets and baselines need to know of a data set: its mean image, and the moments of the outputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codec_dist.attribution.capture import borrowed, checked_output
from codec_dist.attribution.errors import AttributionError
from codec_dist.models import model_call

# ε of Σ + εI as a share of tr Σ / n (docs/method.md §2.6).
RIDGE = 1e-6


@dataclass
class DataStatistics:
    """Running mean image, and mean and covariance of the raw outputs, over the samples of a data set.

    Mergeable: the statistics of parts, merged in any order, are those of the whole (to rounding, in float64).

    Attributes:
        samples: number of samples.
        mean_image: mean of the normalised images, [channels, height, width].
        output_mean: μ, [outputs].
        scatter: Σ over samples of (y - μ)(y - μ)ᵀ, [outputs, outputs].
    """

    samples: int
    mean_image: Float[Tensor, "..."]
    output_mean: Float[Tensor, "outputs"]
    scatter: Float[Tensor, "outputs outputs"]

    @classmethod
    def of(cls, images: Float[Tensor, "batch ..."], outputs: Float[Tensor, "batch outputs"]) -> "DataStatistics":
        """Of one batch: normalised images, and the model's raw outputs for them."""
        images, outputs = images.detach().double().cpu(), outputs.detach().double().cpu()
        mean = outputs.mean(dim=0)
        return cls(len(images), images.mean(dim=0), mean, (outputs - mean).T @ (outputs - mean))

    @classmethod
    def measure(cls, model: nn.Module, batches: Iterable[Tensor]) -> "DataStatistics":
        """Of a data set that comes as batches of normalised images; those whose outputs are not finite are left out.

        Raises:
            AttributionError: there is no usable image, or the output is not [batch, outputs].
        """
        found: DataStatistics | None = None
        with torch.no_grad(), borrowed(model):
            for images in batches:
                parameter = next(model.parameters(), images)
                images = images.to(parameter.device, parameter.dtype)
                with model_call(f"it computed images of {list(images.shape)}"):
                    # A model may change its input.
                    computed = model(images.clone())
                outputs = checked_output(computed, len(images))
                usable = images.flatten(1).isfinite().all(dim=1) & outputs.isfinite().all(dim=1)
                if not usable.any():
                    continue
                part = cls.of(images[usable], outputs[usable])
                if found is None:
                    found = part
                else:
                    found.merge(part)
        if found is None:
            raise AttributionError("statistics of a data set need at least one image whose output is finite")
        return found

    def merge(self, other: "DataStatistics") -> None:
        """Take in the statistics of other samples."""
        samples = self.samples + other.samples
        share = other.samples / samples
        step = other.output_mean - self.output_mean
        self.mean_image = self.mean_image.lerp(other.mean_image, share)
        self.output_mean = self.output_mean + share * step
        self.scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.samples * share)
        self.samples = samples

    @property
    def output_covariance(self) -> Float[Tensor, "outputs outputs"]:
        """Σ, the population covariance of the outputs."""
        return self.scatter / self.samples

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"mean_image": self.mean_image, "output_mean": self.output_mean, "scatter": self.scatter}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file({**tensors, "samples": torch.tensor(self.samples)}, path)

    @classmethod
    def load(cls, path: Path) -> "DataStatistics":
        """Read what :meth:`save` wrote.

        Raises:
            AttributionError: the file is missing or something else.
        """
        try:
            tensors = load_file(path)
            return cls(int(tensors.pop("samples")), **tensors)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise AttributionError(f"{path} does not hold the statistics of a data set: {error}") from error


def ridged_inverse(covariance: Float[Tensor, "outputs outputs"]) -> Float[Tensor, "outputs outputs"]:
    """(Σ + εI)⁻¹ with ε = 10⁻⁶ · tr Σ / n, in float64.

    Raises:
        AttributionError: the outputs do not vary at all.
    """
    covariance = covariance.double()
    if not covariance.isfinite().all():
        raise AttributionError("target surprisal: the covariance of the outputs is not finite")
    ridge = RIDGE * covariance.diagonal().mean()
    if not ridge > 0:
        raise AttributionError("target surprisal: the outputs do not vary over the data set")
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    return torch.linalg.inv(covariance + ridge * identity)
