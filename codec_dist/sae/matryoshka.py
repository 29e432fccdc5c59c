"""Matryoshka BatchTopK (Bussmann et al. 2025, "Learning multi-level features", arXiv 2503.17547)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.arithmetic import mean_square
from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.batchtopk import BatchTopKAutoencoder, BatchTopKOptions


@dataclass(frozen=True, kw_only=True)
class MatryoshkaOptions(BatchTopKOptions):
    """Options of ``matryoshka``."""

    prefixes: Sequence[int | float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    """Nested dictionaries, each the first so many modes, as fractions of all; rising, the last is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(first < second for first, second in pairwise((0, *self.prefixes)))
        if not self.prefixes or not rising or self.prefixes[-1] != 1:
            raise ValueError(f"prefixes must rise from above 0 to 1, found {list(self.prefixes)}")


@ARCHITECTURES.register("matryoshka")
class MatryoshkaAutoencoder(BatchTopKAutoencoder):
    """BatchTopK of which every prefix of the dictionary reconstructs alone: general modes come first.

    With M_1 < … < M_n the prefixes, loss = mean over i of mean (x − b − Σ_{m ≤ M_i} z_m D_m)² + α · AuxK.
    Which loadings survive is decided once, for the whole dictionary.
    """

    architecture = "matryoshka"
    option_type = MatryoshkaOptions
    chosen: MatryoshkaOptions

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        # Small dictionaries may round two prefixes to one.
        self.prefixes = sorted({max(1, round(fraction * self.modes)) for fraction in self.chosen.prefixes})

    def _reconstruction(
        self, rows: Float[Tensor, "*members batch channels"], loadings: Float[Tensor, "*members batch modes"]
    ) -> tuple[Float[Tensor, "*members"], Float[Tensor, "*members batch channels"]]:
        errors = rows if self.decoder_bias is None else rows - self.decoder_bias.unsqueeze(-2)
        losses = []
        for start, end in pairwise((0, *self.prefixes)):
            # The part of these modes that this process holds.
            own = slice(*(min(max(mode - self.first_mode, 0), loadings.shape[-1]) for mode in (start, end)))
            errors = errors - self.mode_group.sum(loadings[..., own] @ self.decoder[..., own, :])
            losses.append(mean_square(errors))
        return sum(losses[1:], losses[0]) / len(losses), errors
