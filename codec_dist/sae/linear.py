"""SAEs with a linear encoder: everything but how preactivations become loadings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from codec_dist.sae.arithmetic import affine, mean_square
from codec_dist.sae.base import Loss, TrainedOptions
from codec_dist.sae.trained import SMALLEST_NORM, TrainedAutoencoder, unit_rows

MEDIAN_ITERATIONS = 50
CACHED_ELEMENTS = 2**18


@dataclass(frozen=True, kw_only=True)
class LinearOptions(TrainedOptions):
    """What every SAE with a linear encoder can be asked for."""

    normalize: bool = True
    """Keep dictionary rows at norm 1, and take the part along the row out of each gradient."""
    decoder_bias: Literal["geometric_median", "mean", "zero", "none"] = "geometric_median"
    """Where the bias that all reconstructions share starts from; `none`: there is no such bias."""


class LinearAutoencoder(TrainedAutoencoder):
    """Preactivations a = (x − b) Eᵀ + c, loadings z = f(a), reconstruction x̂ = z D + b, ‖D_m‖ = 1 by option.

    A subclass defines f (``activate``) and what its loss adds to mean (x − x̂)² (``penalties``).

    Start: E = D (tied), rows of D random directions, b the geometric median of the first rows, c = 0.
    """

    option_type = LinearOptions
    settings: LinearOptions
    mode_parameters: ClassVar[tuple[str, ...]] = ("encoder", "encoder_bias", "decoder")
    member_options: ClassVar[tuple[str, ...]] = ("auxk_coefficient",)
    resampled_gain: ClassVar[float] = 1.0
    """Norm of a resampled mode's encoder, in units of the mean over living modes."""
    decoder_bias: nn.Parameter | None

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        directions = torch.randn(self.modes, channels)
        self.decoder = nn.Parameter(unit_rows(directions.abs() if self.nonnegative else directions))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(self.modes))
        has_bias = self.settings.decoder_bias != "none"
        self.register_parameter("decoder_bias", nn.Parameter(torch.zeros(channels)) if has_bias else None)

    def encode_scaled(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        return self.activate(self._preactivations(rows), rows.shape[-2])

    def decode_scaled(
        self, loadings: Float[Tensor, "*members batch modes"]
    ) -> Float[Tensor, "*members batch channels"]:
        if self.mode_group.size == 1 and self.decoder_bias is not None:
            return affine(self.decoder_bias, loadings, self.decoder.mT)
        own = self.mode_group.sum(loadings @ self.decoder)
        return own if self.decoder_bias is None else own + self.decoder_bias.unsqueeze(-2)

    def atoms(self) -> Float[Tensor, "*members modes channels"]:
        return self.decoder

    def loss(self, rows: Float[Tensor, "*members batch channels"], batch_rows: int | None = None) -> Loss:
        rows = self.scaled(rows)
        preactivations = self._preactivations(rows)
        loadings = self.activate(preactivations, rows.shape[-2] if batch_rows is None else batch_rows)
        self.record_firing(loadings)
        reconstruction, errors = self._reconstruction(rows, loadings)
        terms: dict[str, tuple[float | Tensor, Tensor]] = {"reconstruction": (1.0, reconstruction)}
        terms |= self.penalties(rows, preactivations, loadings)
        auxiliary = self._auxiliary_loss(preactivations, errors)
        if auxiliary is not None:
            terms["auxiliary"] = (self.auxk_coefficient, auxiliary)
        return Loss.weighted(terms)

    @torch.no_grad()
    def before_step(self) -> None:
        """Take out of each dictionary row's gradient the part along the row, which the norm would undo."""
        if self.settings.normalize and self.decoder.grad is not None:
            for gradient, atoms in zip(_blocks(self.decoder.grad), _blocks(self.decoder), strict=True):
                gradient.addcmul_((gradient * atoms).sum(-1, keepdim=True), atoms, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the dictionary back to its constraints, and count who fired."""
        if self.nonnegative:
            self.decoder.clamp_(min=0)
        if self.settings.normalize:
            norms = torch.linalg.vector_norm(self.decoder, dim=-1, keepdim=True)
            self.decoder.div_(norms.clamp_min_(SMALLEST_NORM))
        super().after_step()

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        """Loadings; ``batch_rows`` counts the rows of the whole batch, of which these may be a share."""
        raise NotImplementedError

    def penalties(
        self,
        rows: Float[Tensor, "*members batch channels"],
        preactivations: Float[Tensor, "*members batch modes"],
        loadings: Float[Tensor, "*members batch modes"],
    ) -> dict[str, tuple[float | Tensor, Tensor]]:
        """The terms that the loss adds to the reconstruction's, by name as (weight, value)."""
        return {}

    def _reconstruction(
        self, rows: Float[Tensor, "*members batch channels"], loadings: Float[Tensor, "*members batch modes"]
    ) -> tuple[Float[Tensor, "*members"], Float[Tensor, "*members batch channels"]]:
        """The reconstruction's loss, and the errors that are left."""
        errors = rows - self.decode_scaled(loadings)
        return mean_square(errors), errors

    def _preactivations(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        offset, centred = self._centred(rows)
        return affine(offset, centred, self.encoder)

    def _centred(
        self, rows: Float[Tensor, "*members batch channels"]
    ) -> tuple[Float[Tensor, "*members modes"], Float[Tensor, "*members batch channels"]]:
        """Encoder bias and centred rows, c and x − b, where b has its gradient through c.

        As an input of the matrix product (x − b) Eᵀ, b would cost a gradient to every row of the batch, as
        much as another forward pass.
        """
        if self.decoder_bias is None:
            return self.encoder_bias, rows
        bias = self.mode_group.copy(self.decoder_bias)
        offset = _Offset.apply(self.encoder_bias, bias, self.encoder.detach())
        return offset, rows - bias.detach().unsqueeze(-2)

    def magnitudes(self, loadings: Float[Tensor, "*members batch modes"]) -> Float[Tensor, "*members"]:
        """Σ_m z_m ‖D_m‖ / √channels, averaged over rows: the L1 norm that no rescaling of modes can change.

        Divided by √channels, because rows of unit variance have about that norm: so a weight means the same
        at layers of any width.
        """
        sizes = loadings if self.settings.normalize else loadings * self.decoder.norm(dim=-1).unsqueeze(-2)
        total = sizes.sum((-2, -1)) / max(loadings.shape[-2], 1)
        return self.mode_group.sum(total) / self.channels**0.5

    def reinitialize(
        self,
        dead: Bool[Tensor, "*members modes"],
        scaled_rows: Float[Tensor, "*members batch channels"],
        picked: Int[Tensor, "*members modes"],
        residuals: Float[Tensor, "*members modes channels"],
    ) -> None:
        directions = unit_rows(residuals.relu() if self.nonnegative else residuals)
        self.encoder_bias.masked_fill_(dead, 0)
        for weights, gain in ((self.encoder, self.resampled_gain), (self.decoder, 1.0)):
            size = gain * self._mean_norm(weights, ~dead)[..., None, None]
            weights.copy_(torch.where(dead[..., None], directions * size, weights))

    def _mean_norm(
        self, weights: Float[Tensor, "*members modes channels"], living: Bool[Tensor, "*members modes"]
    ) -> Float[Tensor, "*members"]:
        """Mean norm of the rows of living modes; 1 where none lives."""
        norms = torch.linalg.vector_norm(weights, dim=-1)
        total, count = self.mode_group.sum((norms * living).sum(-1)), self.mode_group.sum(living.sum(-1))
        return torch.where(count > 0, total / count.clamp(min=1), torch.ones_like(total))

    def _start_from(self, scaled_rows: Float[Tensor, "rows channels"]) -> None:
        if self.decoder_bias is None or self.settings.decoder_bias == "zero":
            return
        middle = geometric_median if self.settings.decoder_bias == "geometric_median" else _mean
        self.decoder_bias.copy_(middle(scaled_rows))


class _Offset(torch.autograd.Function):
    """c − (b − b₀) Eᵀ at b = b₀: the value of c, with b's gradient −g E."""

    @staticmethod
    def forward(ctx: Any, encoder_bias: Tensor, bias: Tensor, encoder: Tensor) -> Tensor:
        ctx.save_for_backward(encoder)
        return encoder_bias.view_as(encoder_bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (encoder,) = ctx.saved_tensors
        return gradients[0], -(gradients[0].unsqueeze(-2) @ encoder).squeeze(-2), None


def _blocks(table: Float[Tensor, "*members modes channels"]) -> Sequence[Tensor]:
    """On a CPU, parts of a table small enough for its caches, so that what is made of them stays there."""
    if table.device.type != "cpu":
        return [table]
    return table.split(max(1, CACHED_ELEMENTS // table[..., 0, :].numel()), dim=-2)


def geometric_median(rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "channels"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration in float64."""
    points = rows.double()
    median = points.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        weights = 1 / torch.linalg.vector_norm(points - median, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        median = (weights * points).sum(0) / weights.sum()
    return median.to(rows.dtype)


def _mean(rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "channels"]:
    return rows.double().mean(0).to(rows.dtype)
