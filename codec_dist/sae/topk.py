"""TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093).

A dense step costs five products of [batch, channels] with [channels, modes] (one to encode, one to decode, three for
gradients). Here only the first is left. At 1,024 channels, 3,072 modes, k = 8 and batches of 128 a step takes a third
of the time on one core. On a GPU dense products are the faster ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from codec_dist.sae.arithmetic import affine, mean_square, strongest
from codec_dist.sae.base import ARCHITECTURES, Loss
from codec_dist.sae.linear import LinearAutoencoder, LinearOptions

# Sparse products pay where at most one in so many loadings is not 0, and a dictionary has so many elements:
# below, most of the time goes into starting operations, of which they need more.
SPARSE = 8
SPARSE_ELEMENTS = 2**15


@dataclass(frozen=True, kw_only=True)
class TopKOptions(LinearOptions):
    """Options of ``topk``."""

    k: int = 8
    """Loadings ≠ 0 per row, at most."""
    auxk: int | None = None
    """Dead modes per row that help to explain the residual (AuxK); default: half the channels; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or (self.modes is not None and self.k > self.modes):
            raise ValueError(f"k must lie between 1 and the number of modes, {self.modes}; found {self.k}")


@ARCHITECTURES.register("topk")
class TopKAutoencoder(LinearAutoencoder):
    """z = TopK(ReLU(a)): the k largest of the rectified preactivations; loss = mean (x − x̂)² + α · AuxK."""

    architecture = "topk"
    option_type = TopKOptions
    settings: TopKOptions
    member_options = (*LinearAutoencoder.member_options, "k")
    # Whether the same number of loadings survives in every row, so that sparse products can be used.
    same_in_every_row: ClassVar[bool] = True
    k_of_member: Int[Tensor, "members"] | None

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.k = self.settings.k
        self.register_buffer("k_of_member", None, persistent=False)

    def take_members(self, name: str, values: Sequence[Any]) -> None:
        if name != "k":
            super().take_members(name, values)
            return
        self.k = max(values)
        if len(set(values)) > 1:
            self.k_of_member = torch.tensor(values, device=self.decoder.device)

    def loss(self, rows: Float[Tensor, "*members batch channels"], batch_rows: int | None = None) -> Loss:
        if not self._sparse_pays():
            return super().loss(rows, batch_rows)
        rows = self.scaled(rows)
        offset, centred = self._centred(rows)
        values, modes = rectified_strongest(offset, centred, self.encoder, self.k)
        with torch.no_grad():
            self.statistics[..., :-1] = count_fired(values, modes, self.modes)
            self.statistics[..., -1] = rows.shape[-2]
        approximation = combine(values, modes, self.decoder)
        if self.decoder_bias is not None:
            approximation = approximation + self.decoder_bias.unsqueeze(-2)
        errors = rows - approximation
        terms: dict[str, tuple[float | Tensor, Tensor]] = {"reconstruction": (1.0, mean_square(errors))}
        if self.auxk and self.training and self.dead.any():
            terms["auxiliary"] = (self.auxk_coefficient, self._auxiliary_loss_of_dead(offset, centred, errors))
        return Loss.weighted(terms)

    def _auxiliary_loss_of_dead(
        self,
        offset: Float[Tensor, "*members modes"],
        centred: Float[Tensor, "*members batch channels"],
        errors: Float[Tensor, "*members batch channels"],
    ) -> Float[Tensor, "*members"]:
        """AuxK from the preactivations of dead modes alone (in a stack: of modes that are dead in any member)."""
        dead = self.dead
        some = dead.view(-1, self.modes).any(0).nonzero()[:, 0]
        candidates = affine(offset[..., some], centred, self.encoder[..., some, :])
        return self._explained(candidates, dead[..., some], self.decoder[..., some, :], errors)

    def _sparse_pays(self) -> bool:
        if not self.same_in_every_row or self.decoder.device.type != "cpu" or self.mode_group.size > 1:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        large = self.modes * self.channels >= SPARSE_ELEMENTS
        return large and self.k_of_member is None and SPARSE * self.k <= self.modes

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        values, modes = strongest(preactivations, self.k, self.k_of_member, self.mode_group)
        return torch.zeros_like(preactivations).scatter(-1, modes, values.relu())


# ---- Products with loadings of which only k per row are not 0: on a CPU, several times faster than dense ones


def rectified_strongest(
    offset: Float[Tensor, "*members modes"],
    rows: Float[Tensor, "*members batch channels"],
    encoder: Float[Tensor, "*members modes channels"],
    k: int,
) -> tuple[Float[Tensor, "*members batch k"], Int[Tensor, "*members batch k"]]:
    """The k largest of ReLU(rows · encoderᵀ + offset) per row and their modes; no gradient goes to ``rows``."""
    values, modes = _Strongest.apply(offset, rows, encoder, k)
    return values, modes


def combine(
    values: Float[Tensor, "*members batch k"],
    modes: Int[Tensor, "*members batch k"],
    dictionary: Float[Tensor, "*members modes channels"],
) -> Float[Tensor, "*members batch channels"]:
    """Σ_j values[j] · dictionary[modes[j]] for each row."""
    numbers = _numbered(modes, dictionary.shape[-2]).flatten(0, -2)
    sums = embedding_bag(numbers, dictionary.flatten(0, -2), per_sample_weights=values.flatten(0, -2), mode="sum")
    return sums.view(*modes.shape[:-1], dictionary.shape[-1])


def count_fired(
    values: Float[Tensor, "*members batch k"], modes: Int[Tensor, "*members batch k"], total: int
) -> Float[Tensor, "*members modes"]:
    """For how many rows each of ``total`` modes has a value above 0."""
    counts = values.new_zeros(*modes.shape[:-2], total)
    return counts.scatter_add_(-1, modes.flatten(-2), (values > 0).to(values).flatten(-2))


class _Strongest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, offset: Tensor, rows: Tensor, encoder: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, modes = affine(offset, rows, encoder).topk(k, dim=-1, sorted=False)
        values = values.relu()
        ctx.save_for_backward(rows, modes, values)
        ctx.modes = encoder.shape[-2]
        ctx.mark_non_differentiable(modes)
        return values, modes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        rows, modes, values = ctx.saved_tensors
        passed = (gradients[0] * (values > 0)).flatten(0, -2)
        numbers = _numbered(modes, ctx.modes).flatten(0, -2)
        shape = (*modes.shape[:-2], ctx.modes)
        encoder = _sums_by_mode(passed, numbers, rows.flatten(0, -2), math.prod(shape))
        offset = passed.new_zeros(math.prod(shape)).scatter_add_(0, numbers.flatten(), passed.flatten())
        return offset.view(shape), None, encoder.view(*shape, rows.shape[-1]), None


def _sums_by_mode(
    weights: Float[Tensor, "batch k"],
    numbers: Int[Tensor, "batch k"],
    vectors: Float[Tensor, "batch channels"],
    total: int,
) -> Float[Tensor, "total channels"]:
    """For each of ``total`` modes Σ weights[b, j] · vectors[b] over all (b, j) with that number, in order."""
    flat = numbers.flatten()
    order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=total)
    rows, starts = order // numbers.shape[1], counts.cumsum(0) - counts
    return embedding_bag(rows, vectors, starts, per_sample_weights=weights.flatten()[order], mode="sum")


def _numbered(modes: Tensor, total: int) -> Tensor:
    """Modes numbered through over members."""
    if modes.ndim == 2:
        return modes
    return modes + total * torch.arange(modes.shape[0], device=modes.device)[:, None, None]
