"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410) and Matryoshka BatchTopK (Bussmann et al. 2025, 2503.17547)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.arithmetic import batch_threshold, mean_square, wide
from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.topk import TopKAutoencoder, TopKOptions


@dataclass(frozen=True, kw_only=True)
class BatchTopKOptions(TopKOptions):
    """Options of ``batchtopk``."""

    k: int = 8
    """Loadings ≠ 0 per row, on average over a batch."""
    threshold_memory: int = 100
    """Batches over which the threshold of inference is averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_memory < 1:
            raise ValueError(f"threshold_memory must be at least 1, found {self.threshold_memory}")


@ARCHITECTURES.register("batchtopk")
class BatchTopKAutoencoder(TopKAutoencoder):
    """In training the k · batch largest positive preactivations of a batch survive, in eval mode those above θ.

    θ is a running mean over training batches of the smallest surviving value: with weights that fall by the
    factor 1 − 1/``threshold_memory`` per batch, so that values from the start of the training fade. So in
    eval mode the loadings of a row do not depend on the rows beside it. Before the first batch θ = 0.

    The batch is the global one: values are compared over all processes of ``row_group`` (and modes over
    all of ``mode_group``). Equal values at the limit survive together.
    """

    architecture = "batchtopk"
    option_type = BatchTopKOptions
    settings: BatchTopKOptions
    same_in_every_row = False
    # Σ rows · smallest survivor, and Σ rows, of processes that saw one: their ratio is the batch's.
    extra_statistics = 2
    threshold_sums: Float[Tensor, "*members two"]

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        # The weighted sum of smallest survivors so far, and the sum of the weights.
        self.register_buffer("threshold_sums", torch.zeros(2))
        self._smallest = torch.tensor(torch.inf)

    @property
    def threshold(self) -> Float[Tensor, "*members"]:
        """θ, in units of scaled rows."""
        total, weight = self.threshold_sums.unbind(-1)
        return torch.where(weight > 0, total / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the batch's smallest survivor into the threshold; constraints and counts."""
        super().after_step()
        smallest, rows = self.statistics[..., -2:].unbind(-1)
        seen = (rows > 0).to(rows)
        share = 1 / self.settings.threshold_memory
        new = torch.stack([smallest / rows.clamp(min=1), seen], -1)
        self.threshold_sums.mul_(1 - share * seen[..., None]).add_(new, alpha=share)

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        if not self.training:
            return preactivations * (preactivations > wide(self.threshold))
        batch_rows = max(batch_rows, 1)
        counts = None if self.k_of_member is None else self.k_of_member * batch_rows
        limit, smallest = batch_threshold(preactivations, self.k * batch_rows, counts, self.row_group, self.mode_group)
        self._smallest = smallest
        return preactivations * ((preactivations >= wide(limit)) & (preactivations > 0))

    @torch.no_grad()
    def record_firing(self, loadings: Float[Tensor, "*members batch modes"]) -> None:
        super().record_firing(loadings)
        if self.training:
            rows = self._smallest.isfinite() * loadings.shape[-2]
            self.statistics[..., -2] = self._smallest.nan_to_num(posinf=0) * rows
            self.statistics[..., -1] = rows


# ---- Matryoshka BatchTopK (Bussmann et al. 2025, "Learning multi-level features", arXiv 2503.17547)


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
    settings: MatryoshkaOptions

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        # Small dictionaries may round two prefixes to one.
        self.prefixes = sorted({max(1, round(fraction * self.modes)) for fraction in self.settings.prefixes})

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
