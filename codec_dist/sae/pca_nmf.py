"""Reference decompositions that are fitted in one pass over the rows: principal components, and NMF by scikit-learn."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.arithmetic import mean_square
from codec_dist.sae.base import ARCHITECTURES, Loss, Options, SparseAutoencoder
from codec_dist.sae.errors import SaeError
from codec_dist.sae.trained import unit_rows

TOLERANCE = 1e-7


@dataclass(frozen=True, kw_only=True)
class PcaOptions(Options):
    """Options of ``pca``; by default there are as many modes as channels."""

    k: int | None = None
    """Keep only the k loadings of a row that are largest in absolute value; default: all."""

    def resolve(self, channels: int) -> "PcaOptions":
        resolved = replace(self, modes=channels if self.modes is None else self.modes)
        assert resolved.modes is not None
        if resolved.modes > channels:
            raise ValueError(f"{channels} channels have at most {channels} components, not {resolved.modes} modes")
        if not 1 <= (resolved.k or 1) <= resolved.modes:
            raise ValueError(f"k must lie between 1 and the number of modes, {resolved.modes}; found {resolved.k}")
        return resolved


class FittedAutoencoder(SparseAutoencoder):
    """A decomposition with a recipe of its own: ``calibrate``, then ``fit``, and it is done.

    ``fit`` sees all rows in one pass. On several processes, one fits and sends its state to the others.
    """

    decoder: Tensor
    """The dictionary, in units of scaled rows."""
    fitted: Tensor
    """Whether ``fit`` was called."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("decoder", torch.zeros(self.modes, channels))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find the dictionary.

        Args:
            batches: rows of the fit part, [batch, channels] in stored units, each once.

        Raises:
            SaeError: no rows, or rows that the method cannot take.
        """
        raise NotImplementedError

    def atoms(self) -> Float[Tensor, "modes channels"]:
        return self.decoder

    def loss(self, rows: Float[Tensor, "batch channels"], batch_rows: int | None = None) -> Loss:
        """The mean squared error of scaled rows, for comparison: there is nothing to minimize."""
        rows = self.scaled(rows)
        return Loss.weighted(
            {"reconstruction": (1.0, mean_square(rows - self.decode_scaled(self.encode_scaled(rows))))}
        )

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise SaeError(f"this {self.architecture} was not fitted: call fit with the rows of the fit part first")


@ARCHITECTURES.register("pca")
class PcaAutoencoder(FittedAutoencoder):
    """z = (x − μ) Dᵀ, x̂ = z D + μ, with D the eigenvectors of the covariance with the largest eigenvalues.

    Loadings have either sign: the only architecture of which that is so. An eigenvector's largest entry (in
    absolute value) is positive.
    """

    architecture = "pca"
    option_type = PcaOptions
    settings: PcaOptions
    mean: Float[Tensor, "channels"]
    variances: Float[Tensor, "modes"]
    """Of the loadings: the eigenvalues of the covariance of scaled rows."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variances", torch.zeros(self.modes))

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        self._check_fitted()
        scores = (rows - self.mean) @ self.decoder.T
        if self.settings.k is None:
            return scores
        largest = scores.abs().topk(self.settings.k, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, largest, scores.gather(-1, largest))

    def decode_scaled(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        self._check_fitted()
        return torch.addmm(self.mean, loadings, self.decoder)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find mean and components; sums in float64, around the mean of the first batch."""
        count, origin = 0, torch.zeros(0)
        for rows in batches:
            if not len(rows):
                continue
            wide = self.scaled(rows.to(self.decoder)).double()
            if not count:
                origin = wide.mean(0)
                total, products = torch.zeros_like(origin), torch.zeros_like(torch.outer(origin, origin))
            wide = wide - origin
            count, total = count + len(wide), total + wide.sum(0)
            products.addmm_(wide.T, wide)
        if not count:
            raise SaeError("pca cannot be fitted on no rows")
        offset = total / count
        values, vectors = torch.linalg.eigh(products / count - torch.outer(offset, offset))
        components = vectors.T.flip(0)[: self.modes]
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.decoder.copy_(components * largest.sign())
        self.variances.copy_(values.flip(0)[: self.modes])
        self.mean.copy_(origin + offset)
        self.fitted.fill_(True)


# ---- Nonnegative matrix factorization as a baseline (Lee and Seung 1999), by scikit-learn


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
    settings: NmfOptions

    @property
    def _flips(self) -> bool:
        return True

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        self._check_fitted()
        return nonnegative_loadings(rows, self.decoder, self.settings.iterations)

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

        kept = _reservoir((self.scaled(rows.to(self.decoder)) for rows in batches), self.settings)
        if not len(kept):
            raise SaeError("nmf cannot be fitted on no rows")
        if (kept < 0).any():
            channel = int((kept < 0).any(0).nonzero()[0])
            raise SaeError(
                f"nmf needs channels of one sign, but channel {channel} has both: decompose the positive or the "
                "negative part, or choose another architecture"
            )
        options: dict[str, Any] = {"max_iter": self.settings.iterations, "random_state": self.settings.seed}
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
    starts again where it points uphill (O'Donoghue and Candès 2015).
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
