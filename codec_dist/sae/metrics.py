"""How well an SAE reconstructs held-out rows, and how sparse its loadings are (docs/method.md §3)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.sae.errors import SaeError

DENSITY_EDGES = torch.arange(-7.0, 0.01, 0.25, dtype=torch.float64)
COHERENCE_BLOCK = 1024


@dataclass(frozen=True)
class ReconstructionReport:
    """Metrics over the samples seen. NaN where undefined (e.g. EV of rows that are all equal)."""

    samples: int
    """Rows seen; also the window, in samples, over which a mode counts as dead."""
    ev: float
    """Explained variance 1 − Σ‖x−x̂‖² / (Σ‖x‖² − ‖Σx‖²/n)."""
    fvu: float
    """Fraction of variance unexplained, 1 − EV."""
    r2_global: float
    """The paper's "R²": as EV, but with one mean over all channels instead of one per channel."""
    mse: float
    """Mean squared error per element, in squared stored units."""
    l0: float
    """Mean number of loadings ≠ 0 per row."""
    dead_fraction: float
    """Fraction of modes that fired for none of the samples."""
    cosine: float
    """Mean cosine of x and x̂ over rows x ≠ 0; a reconstruction of 0 counts as 0."""
    shrinkage: float
    """Mean ‖x̂‖/‖x‖ over rows x ≠ 0."""
    hoyer_loadings: float
    """Mean Hoyer sparsity of the loadings of a row, over rows with any."""
    hoyer_dictionary: float
    """Mean Hoyer sparsity of the dictionary's rows ≠ 0 over channels."""
    coherence: float
    """Largest |cosine| between two rows of the dictionary."""
    frequency: Float[Tensor, "modes"]
    """Fraction of rows for which each mode fires (its density)."""

    @property
    def density_histogram(self) -> Int[Tensor, "bins"]:
        """Alive modes per bin of log10(frequency); bins of width 0.25 from −7 to 0."""
        alive = self.frequency[self.frequency > 0].double().log10()
        return torch.histogram(alive, DENSITY_EDGES).hist.long()

    def numbers(self) -> dict[str, int | float]:
        """The scalar metrics by name."""
        return {name: value for name, value in vars(self).items() if name != "frequency"}

    def as_dict(self) -> dict[str, Any]:
        """JSON values: NaN becomes null."""
        numbers = {name: None if math.isnan(value) else value for name, value in self.numbers().items()}
        return numbers | {
            "density_histogram": self.density_histogram.tolist(),
            "frequency": self.frequency.tolist(),
        }


class ReconstructionMetrics:
    """One-pass metrics of (rows, reconstruction, loadings), mergeable, with float64 sums.

    Variances are kept as sums of squares around running means (Chan, Golub, LeVeque 1983), because
    Σ‖x‖² − ‖Σx‖²/n cancels when the means are large. All in stored units; the sums live on the CPU.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._fired = torch.zeros(0, dtype=torch.int64)
        # squares around the mean, squared error, cosine, shrinkage, rows ≠ 0, Hoyer, rows with loadings
        self._sums = torch.zeros(7, dtype=torch.float64)

    def update(
        self,
        rows: Float[Tensor, "batch channels"],
        reconstruction: Float[Tensor, "batch channels"],
        loadings: Float[Tensor, "batch modes"],
    ) -> None:
        """Take in a batch.

        Raises:
            SaeError: the number of channels or modes differs from the batches before.
        """
        if len(rows) == 0:
            return
        batch = ReconstructionMetrics()
        x, approximation = rows.detach().double(), reconstruction.detach().double()
        batch.samples = len(x)
        mean = x.mean(0)
        norms = torch.linalg.vector_norm(x, dim=1)
        approximation_norms = torch.linalg.vector_norm(approximation, dim=1)
        nonzero = norms > 0
        # Where a norm is 0 its divisor does not matter: rows x = 0 are left out, and x̂ = 0 has the cosine 0.
        divisors = norms.masked_fill(~nonzero, 1)
        cosines = (x * approximation).sum(1) / divisors / approximation_norms.masked_fill(approximation_norms == 0, 1)
        ratios = approximation_norms / divisors
        sparsity = _hoyer(loadings.detach().double())
        defined = ~sparsity.isnan()
        terms = [
            (x - mean).square().sum(),
            (x - approximation).square().sum(),
            (cosines * nonzero).sum(),
            (ratios * nonzero).sum(),
            nonzero.sum(),
            sparsity.nan_to_num(0).sum(),
            defined.sum(),
        ]
        batch._mean, batch._sums = mean.cpu(), torch.stack([term.double() for term in terms]).cpu()
        batch._fired = (loadings.detach() != 0).sum(0).cpu()
        self.merge(batch)

    def merge(self, other: "ReconstructionMetrics") -> "ReconstructionMetrics":
        """Take in all that ``other`` has seen; ``other`` is left as it is. Returns self.

        Raises:
            SaeError: ``other`` has seen rows of another width or another number of modes.
        """
        if other.samples == 0:
            return self
        if self.samples == 0:
            self.samples = other.samples
            self._mean, self._fired, self._sums = other._mean.clone(), other._fired.clone(), other._sums.clone()
            return self
        if self._mean.shape != other._mean.shape or self._fired.shape != other._fired.shape:
            raise SaeError(
                f"metrics of {len(self._mean)} channels and {len(self._fired)} modes cannot take in rows of "
                f"{len(other._mean)} channels and {len(other._fired)} modes"
            )
        total = self.samples + other.samples
        difference = other._mean - self._mean
        self._sums = self._sums + other._sums
        self._sums[0] += difference.square().sum() * (self.samples * other.samples / total)
        self._mean = self._mean + difference * (other.samples / total)
        self._fired = self._fired + other._fired
        self.samples = total
        return self

    def result(self, dictionary: Float[Tensor, "modes channels"] | None = None) -> ReconstructionReport:
        """The metrics so far; those of the dictionary are NaN where none is given.

        Raises:
            SaeError: no rows were seen.
        """
        if self.samples == 0:
            raise SaeError("no rows were seen, so there are no metrics: the part of the split is empty")
        squares, error, cosine, shrinkage, nonzero, sparsity, defined = self._sums.tolist()
        fired, channels = self._fired, len(self._mean)
        means_apart = (self._mean - self._mean.mean()).square().sum().item() * self.samples
        return ReconstructionReport(
            samples=self.samples,
            ev=1 - _ratio(error, squares),
            fvu=_ratio(error, squares),
            r2_global=1 - _ratio(error, squares + means_apart),
            mse=error / (self.samples * channels),
            l0=fired.sum().item() / self.samples,
            dead_fraction=(fired == 0).double().mean().item(),
            cosine=_ratio(cosine, nonzero),
            shrinkage=_ratio(shrinkage, nonzero),
            hoyer_loadings=_ratio(sparsity, defined),
            hoyer_dictionary=math.nan if dictionary is None else _hoyer(dictionary.double()).nanmean().item(),
            coherence=math.nan if dictionary is None else coherence(dictionary),
            frequency=fired.double() / self.samples,
        )


def coherence(dictionary: Float[Tensor, "modes channels"]) -> float:
    """The largest |cosine| between two different rows ≠ 0; NaN with fewer than two such rows."""
    # Block by block, so that there is no second dictionary in float64.
    blocks = dictionary.detach().split(COHERENCE_BLOCK)
    largest, count = 0.0, 0
    for place, block in enumerate(blocks):
        some = _unit(block)
        count += len(some)
        # Cosines are the same both ways: blocks before this one have been compared with it.
        for other in blocks[place:]:
            cosines = (some @ _unit(other).T).abs_()
            if other is block:
                cosines.fill_diagonal_(0)
            if cosines.numel():
                largest = max(largest, cosines.max().item())
    return largest if count > 1 else math.nan


def _unit(vectors: Float[Tensor, "vectors channels"]) -> Float[Tensor, "nonzero channels"]:
    """Rows ≠ 0 in float64, divided by their norms."""
    vectors = vectors.double()
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return (vectors / norms)[norms[:, 0] > 0]


def _hoyer(vectors: Float[Tensor, "vectors width"]) -> Float[Tensor, "vectors"]:
    """(√d − ‖v‖₁/‖v‖₂)/(√d − 1); NaN for an all-zero vector or a width of 1."""
    root = math.sqrt(vectors.shape[1])
    ratio = vectors.abs().sum(1) / torch.linalg.vector_norm(vectors, dim=1)
    return (root - ratio) / (root - 1) if root > 1 else torch.full_like(ratio, math.nan)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
