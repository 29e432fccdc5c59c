"""JumpReLU (Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435)."""

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from codec_dist.sae.arithmetic import row_mean, wide
from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.linear import LinearAutoencoder, LinearOptions


@dataclass(frozen=True, kw_only=True)
class JumpReluOptions(LinearOptions):
    """Options of ``jumprelu``."""

    l0: int | float = 0.003
    """Weight λ of the number of loadings ≠ 0 of a row."""
    initial_threshold: int | float = 0.5
    """Every mode's threshold θ at the start, in units of scaled rows."""
    bandwidth: int | float = 0.5
    """Width ε of the window around θ from which θ gets its gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l0 < 0 or self.initial_threshold <= 0 or self.bandwidth <= 0:
            raise ValueError("l0 must not be negative, initial_threshold and bandwidth must be above 0")


@ARCHITECTURES.register("jumprelu")
class JumpReluAutoencoder(LinearAutoencoder):
    """z = a · 1[a > θ], a threshold θ > 0 per mode; loss = mean (x − x̂)² + λ · mean ‖z‖₀.

    θ = exp(``log_threshold``) is trained by pseudo-derivatives, with the rectangle K(u) = 1[|u| < ½]:
    ∂z/∂θ = −(θ/ε) K((a − θ)/ε) and ∂1[a > θ]/∂θ = −(1/ε) K((a − θ)/ε). They are given to autograd as terms
    whose value is 0. Preactivations here are about √channels larger than in the paper, whose rows have norm
    1, and so are sensible θ and ε.
    """

    architecture = "jumprelu"
    option_type = JumpReluOptions
    settings: JumpReluOptions
    mode_parameters = (*LinearAutoencoder.mode_parameters, "log_threshold")
    member_options = (*LinearAutoencoder.member_options, "l0", "bandwidth")

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.l0: float | Tensor = self.settings.l0
        self.bandwidth: float | Tensor = self.settings.bandwidth
        self.log_threshold = nn.Parameter(torch.full((self.modes,), log(self.settings.initial_threshold)))

    @property
    def threshold(self) -> Float[Tensor, "*members modes"]:
        """θ, in units of scaled rows."""
        return self.log_threshold.exp()

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        threshold = self.threshold.unsqueeze(-2)
        loadings = preactivations * (preactivations > threshold)
        if not torch.is_grad_enabled():
            return loadings
        return loadings + threshold.detach() * self._pull(preactivations)

    def penalties(
        self,
        rows: Float[Tensor, "*members batch channels"],
        preactivations: Float[Tensor, "*members batch modes"],
        loadings: Float[Tensor, "*members batch modes"],
    ) -> dict[str, tuple[float | Tensor, Tensor]]:
        fired = (loadings > 0) + self._pull(preactivations)
        return {"l0": (self.l0, self.mode_group.sum(row_mean(fired.sum(-1))))}

    def _pull(self, preactivations: Float[Tensor, "*members batch modes"]) -> Float[Tensor, "*members batch modes"]:
        """Zeros whose derivative by θ is −K((a − θ)/ε)/ε."""
        threshold, width = self.threshold.unsqueeze(-2), wide(self.bandwidth)
        window = ((preactivations - threshold).abs() < width / 2).to(preactivations) / width
        return window.detach() * (threshold.detach() - threshold)

    def reinitialize(
        self,
        dead: Bool[Tensor, "*members modes"],
        scaled_rows: Float[Tensor, "*members batch channels"],
        picked: Int[Tensor, "*members modes"],
        residuals: Float[Tensor, "*members modes channels"],
    ) -> None:
        super().reinitialize(dead, scaled_rows, picked, residuals)
        self.log_threshold.masked_fill_(dead, log(self.settings.initial_threshold))
