"""TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.sae.arithmetic import affine, mean_square
from codec_dist.sae.base import ARCHITECTURES, Loss
from codec_dist.sae.linear import LinearAutoencoder, LinearOptions
from codec_dist.sae.selection import strongest
from codec_dist.sae.sparse import combine, count_fired, rectified_strongest

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
    chosen: TopKOptions
    member_options = (*LinearAutoencoder.member_options, "k")
    # Whether the same number of loadings survives in every row, so that sparse products can be used.
    same_in_every_row: ClassVar[bool] = True
    k_of_member: Int[Tensor, "members"] | None

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.k = self.chosen.k
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

    def _activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        values, modes = strongest(preactivations, self.k, self.k_of_member, self.mode_group)
        return torch.zeros_like(preactivations).scatter(-1, modes, values.relu())
