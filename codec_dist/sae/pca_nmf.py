"""Principal components as a baseline, from one pass over the rows."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.errors import SaeError
from codec_dist.sae.fitted import FittedAutoencoder
from codec_dist.sae.options import Options


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


@ARCHITECTURES.register("pca")
class PcaAutoencoder(FittedAutoencoder):
    """z = (x − μ) Dᵀ, x̂ = z D + μ, with D the eigenvectors of the covariance with the largest eigenvalues.

    Loadings have either sign: the only architecture of which that is so. An eigenvector's largest entry (in
    absolute value) is positive.
    """

    architecture = "pca"
    option_type = PcaOptions
    chosen: PcaOptions
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
        if self.chosen.k is None:
            return scores
        largest = scores.abs().topk(self.chosen.k, dim=-1).indices
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
