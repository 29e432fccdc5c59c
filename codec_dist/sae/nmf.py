"""Nonnegative matrix factorization as a baseline (Lee and Seung 1999), by scikit-learn."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.errors import SaeError
from codec_dist.sae.fitted import FittedAutoencoder
from codec_dist.sae.options import Options
from codec_dist.sae.trained import unit_rows

TOLERANCE = 1e-7


@dataclass(frozen=True, kw_only=True)
class NmfOptions(Options):
    """Options of ``nmf``; by default there are as many modes as channels."""

    max_rows: int = 20_000
    """Rows that the factorization holds in memory, drawn evenly from those given."""
    iterations: int = 500
    """Iterations of the factorization, and of finding the loadings of new rows, at most."""
    seed: int = 0
    """Of the start and of the draw of rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rows < 1 or self.iterations < 1:
            raise ValueError("max_rows and iterations must be at least 1")


@ARCHITECTURES.register("nmf")
class NmfAutoencoder(FittedAutoencoder):
    """X ≈ Z D with Z, D ≥ 0 and ‖D_m‖ = 1, minimal in ‖X − Z D‖²; loadings of new rows by least squares with z ≥ 0.

    Channels whose rows are all ≤ 0 (the negative part of contributions) are flipped inside, so their entries
    in ``dictionary`` are ≤ 0. Rows whose channels have both signs (net contributions) are refused.
    """

    architecture = "nmf"
    option_type = NmfOptions
    chosen: NmfOptions

    @property
    def _flips(self) -> bool:
        return True

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        self._check_fitted()
        return nonnegative_loadings(rows, self.decoder, self.chosen.iterations)

    def decode_scaled(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        self._check_fitted()
        return loadings @ self.decoder

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Factorize up to ``max_rows`` of the rows.

        Raises:
            SaeError: no rows, or values of another sign than the rows given to ``calibrate``.
        """
        from sklearn.decomposition import NMF

        kept = _reservoir((self.scaled(rows.to(self.decoder)) for rows in batches), self.chosen)
        if not len(kept):
            raise SaeError("nmf cannot be fitted on no rows")
        if (kept < 0).any():
            channel = int((kept < 0).any(0).nonzero()[0])
            raise SaeError(
                f"nmf needs channels of one sign, but channel {channel} has both: decompose the positive or the "
                "negative part, or choose another architecture"
            )
        options: dict[str, Any] = {"max_iter": self.chosen.iterations, "random_state": self.chosen.seed}
        start = "nndsvda" if self.modes <= min(kept.shape) else "random"
        found = NMF(self.modes, init=start, **options)
        found.fit(kept.double().cpu().numpy())
        self.decoder.copy_(unit_rows(torch.from_numpy(found.components_)))
        self.fitted.fill_(True)


@torch.no_grad()
def nonnegative_loadings(
    rows: Float[Tensor, "batch channels"], dictionary: Float[Tensor, "modes channels"], iterations: int
) -> Float[Tensor, "batch modes"]:
    """The z ≥ 0 with the least ‖x − z D‖² for each row, by accelerated projected gradients (Beck and Teboulle 2009).

    Stops once no loading moves by more than 1e-7 of the largest, or after ``iterations``. The momentum
    starts anew where it points uphill (O'Donoghue and Candès 2015).
    """
    gram, target = dictionary @ dictionary.T, rows @ dictionary.T
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12)
    loadings = torch.zeros_like(target)
    ahead, momentum = loadings, torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    for _ in range(iterations):
        found = (ahead - step * (ahead @ gram - target)).relu()
        move = found - loadings
        uphill = ((ahead - found) * move).sum(1, keepdim=True) > 0
        following = torch.where(uphill, 1, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = found + torch.where(uphill, 0, (momentum - 1) / following) * move
        loadings, momentum = found, following
        if move.abs().max() <= TOLERANCE * found.abs().max():
            break
    return loadings


def _reservoir(batches: Iterable[Tensor], options: NmfOptions) -> Tensor:
    """At most ``max_rows`` of all rows, each as likely as any other: those with the smallest random keys."""
    generator = torch.Generator().manual_seed(options.seed)
    rows, keys = torch.zeros(0, 0), torch.zeros(0)
    for batch in batches:
        batch_keys = torch.rand(len(batch), generator=generator, dtype=torch.float64)
        rows = torch.cat([rows, batch.cpu()]) if rows.numel() else batch.cpu()
        keys = torch.cat([keys, batch_keys]) if keys.numel() else batch_keys
        if len(keys) > options.max_rows:
            kept = keys.topk(options.max_rows, largest=False).indices.sort().values
            rows, keys = rows[kept], keys[kept]
    return rows
