"""What the engine hands back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LayerResult:
    """One layer's numbers for a batch, per channel, on the model's device.

    Attributes:
        positive, negative: contributions, split by sign at each position and then summed; negative ≤ 0.
        activation_positive, activation_negative: h at the images, reduced alike; None unless asked for.
        gradient_positive, gradient_negative: ∂T/∂h at the images, reduced alike; None unless asked for.
        completeness: residual ΣC - (T(x) - T(x₀)), C over all positions; None for a layer that is not a cut
            and for methods other than integrated gradients.
    """

    positive: Float[Tensor, "batch channels"]
    negative: Float[Tensor, "batch channels"]
    activation_positive: Float[Tensor, "batch channels"] | None = None
    activation_negative: Float[Tensor, "batch channels"] | None = None
    gradient_positive: Float[Tensor, "batch channels"] | None = None
    gradient_negative: Float[Tensor, "batch channels"] | None = None
    completeness: Float[Tensor, "batch"] | None = None

    @property
    def net(self) -> Float[Tensor, "batch channels"]:
        """Positive plus negative contributions."""
        return self.positive + self.negative

    def quantities(self) -> dict[str, Float[Tensor, "batch channels"]]:
        """The numbers that are there, under the names they are stored by (``contribution-positive``, ...)."""
        named = {
            "contribution-positive": self.positive,
            "contribution-negative": self.negative,
            "activation-positive": self.activation_positive,
            "activation-negative": self.activation_negative,
            "gradient-positive": self.gradient_positive,
            "gradient-negative": self.gradient_negative,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class AttributionResult(Mapping[str, LayerResult]):
    """A mapping from layer key to :class:`LayerResult` for one target, and what concerns all layers.

    Attributes:
        layers: the results by layer key.
        target_value: T(x).
        baseline_value: T(x₀); NaN for methods without a baseline.
        prediction: index of the largest output at the images.
        target: name of the target.
        others: the results for further targets by name, where there are several.
        steps: of each image's path, where images have paths of their own; else None.
    """

    layers: dict[str, LayerResult]
    target_value: Float[Tensor, "batch"]
    baseline_value: Float[Tensor, "batch"]
    prediction: Int[Tensor, "batch"]
    target: str = ""
    others: dict[str, "AttributionResult"] = field(default_factory=dict)
    steps: Int[Tensor, "batch"] | None = None

    def __getitem__(self, layer: str) -> LayerResult:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def concatenate(parts: Sequence[AttributionResult]) -> AttributionResult:
    """The results of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    steps = [part.steps for part in parts if part.steps is not None]
    return AttributionResult(
        {layer: _concatenate_layer([part[layer] for part in parts]) for layer in parts[0]},
        torch.cat([part.target_value for part in parts]),
        torch.cat([part.baseline_value for part in parts]),
        torch.cat([part.prediction for part in parts]),
        parts[0].target,
        {name: concatenate([part.others[name] for part in parts]) for name in parts[0].others},
        None if not steps else torch.cat(steps),
    )


def relative_residual(
    residual: Float[Tensor, "samples"],
    target_value: Float[Tensor, "samples"],
    baseline_value: Float[Tensor, "samples"],
) -> Float[Tensor, "samples"]:
    """|r| / max(|ΔT|, 10⁻³ · median |ΔT|) with ΔT = T(x) - T(x₀): how far contributions miss their sum.

    A residual of 0 is 0 also where the target never changes.
    """
    change = (target_value - baseline_value).abs()
    floor = 1e-3 * change.quantile(0.5) if len(change) else change.new_zeros(())
    relative = residual.abs() / change.maximum(floor)
    return torch.where(residual == 0, torch.zeros_like(relative), relative)


def _concatenate_layer(parts: Sequence[LayerResult]) -> LayerResult:
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(LayerResult)}
    return LayerResult(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})
