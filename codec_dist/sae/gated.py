"""Gated SAEs (Rajamanoharan et al. 2024, "Improving dictionary learning with gated SAEs", arXiv 2404.16014)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from codec_dist.sae.arithmetic import mean_square
from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.linear import LinearAutoencoder, LinearOptions


@dataclass(frozen=True, kw_only=True)
class GatedOptions(LinearOptions):
    """Options of ``gated``."""

    l1: int | float = 0.2
    """Weight λ of the L1 norm of the rectified gates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 < 0:
            raise ValueError(f"l1 must not be negative, found {self.l1}")


@ARCHITECTURES.register("gated")
class GatedAutoencoder(LinearAutoencoder):
    """Whether a mode fires and how much are decided apart: z = 1[π > 0] · ReLU(exp(r) · (x − b) Eᵀ + m).

    π = (x − b) Eᵀ + c is the gate; both paths share E up to the gain exp(r) of each mode. The loss is
    mean (x − x̂)² + λ · Σ ReLU(π_m) ‖D_m‖ / √channels + mean (x − (ReLU(π) D + b))², where the last term sees
    D and the added b as constants: it teaches the gate alone, and shrinkage stays out of the magnitudes.
    """

    architecture = "gated"
    option_type = GatedOptions
    settings: GatedOptions
    mode_parameters = (*LinearAutoencoder.mode_parameters, "log_gain", "magnitude_bias")
    member_options = (*LinearAutoencoder.member_options, "l1")
    resampled_gain = 0.2

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.l1: float | Tensor = self.settings.l1
        self.log_gain = nn.Parameter(torch.zeros(self.modes))
        self.magnitude_bias = nn.Parameter(torch.zeros(self.modes))

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        shared = preactivations - self.encoder_bias.unsqueeze(-2)
        magnitudes = self.log_gain.exp().unsqueeze(-2) * shared + self.magnitude_bias.unsqueeze(-2)
        return magnitudes.relu() * (preactivations > 0)

    def penalties(
        self,
        rows: Float[Tensor, "*members batch channels"],
        preactivations: Float[Tensor, "*members batch modes"],
        loadings: Float[Tensor, "*members batch modes"],
    ) -> dict[str, tuple[float | Tensor, Tensor]]:
        gates = preactivations.relu()
        by_gates = self.mode_group.sum(gates @ self.decoder.detach())
        if self.decoder_bias is not None:
            by_gates = by_gates + self.decoder_bias.detach().unsqueeze(-2)
        return {"l1": (self.l1, self.magnitudes(gates)), "gate": (1.0, mean_square(rows - by_gates))}

    def reinitialize(
        self,
        dead: Bool[Tensor, "*members modes"],
        scaled_rows: Float[Tensor, "*members batch channels"],
        picked: Int[Tensor, "*members modes"],
        residuals: Float[Tensor, "*members modes channels"],
    ) -> None:
        super().reinitialize(dead, scaled_rows, picked, residuals)
        self.log_gain.masked_fill_(dead, 0)
        self.magnitude_bias.masked_fill_(dead, 0)
