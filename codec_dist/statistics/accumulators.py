"""Accumulators of one pass over rows: moments, distributions, sparsity, class means and E/I correlation."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec_dist.statistics.errors import StatisticsError

BINS = 1000

VARIANCE_FRACTION = 0.95


@dataclass(frozen=True)
class Distribution:
    """A quantity over samples. Numbers are None where no sample has a defined value."""

    samples: int
    """Samples with a defined value."""
    undefined: int
    """Samples for which the quantity is undefined."""
    mean: float | None
    first_quartile: float | None
    median: float | None
    third_quartile: float | None
    low: float
    """Lower edge of the first bin."""
    high: float
    """Upper edge of the last bin."""
    histogram: Int[Tensor, "bins"]
    """Samples in each of the equally wide bins from low to high."""


class DistributionAccumulator:
    """Mergeable distribution of a quantity that lies in [low, high].

    Mean, minimum and maximum are exact. A quantile is within one bin, (high − low)/bins, of what
    ``numpy.quantile`` gives on all values (a thousandth of the range by default).
    """

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.undefined = 0
        self._moments = Moments(1)
        self._counts = torch.zeros(bins, dtype=torch.int64)

    @property
    def samples(self) -> int:
        """Values seen, without the undefined ones."""
        return self._moments.count

    def update(self, values: Float[Tensor, "batch"]) -> None:
        """Add values; nan stands for undefined.

        Raises:
            StatisticsError: a value outside [low, high].
        """
        values = values.to("cpu", torch.float64)
        defined = values[~values.isnan()]
        outside = defined[(defined < self.low) | (defined > self.high)]
        if len(outside):
            raise StatisticsError(f"value {float(outside[0]):g} is outside the range {self.low:g} to {self.high:g}")
        position = (defined - self.low) * (self.bins / (self.high - self.low))
        self._counts += torch.bincount(position.long().clamp(max=self.bins - 1), minlength=self.bins)
        self._moments.update(defined[:, None])
        self.undefined += len(values) - len(defined)

    def merge(self, other: "DistributionAccumulator") -> "DistributionAccumulator":
        """Add what ``other`` has seen; returns self.

        Raises:
            StatisticsError: the other has other bins.
        """
        if (other.low, other.high, other.bins) != (self.low, self.high, self.bins):
            raise StatisticsError(
                f"a histogram of {other.bins} bins from {other.low:g} to {other.high:g} merged into one of "
                f"{self.bins} bins from {self.low:g} to {self.high:g}"
            )
        self._moments.merge(other._moments)
        self._counts = self._counts + other._counts
        self.undefined += other.undefined
        return self

    def quantile(self, fraction: float) -> float | None:
        """The value below which ``fraction`` of the samples lie, to one bin; None without samples."""
        if not self.samples:
            return None
        rank = fraction * (self.samples - 1)
        before = int(rank)
        after = min(before + 1, self.samples - 1)
        low, high = self._order_statistic(before), self._order_statistic(after)
        return low + (rank - before) * (high - low)

    def result(self) -> Distribution:
        """The distribution of all that was added so far."""
        return Distribution(
            samples=self.samples,
            undefined=self.undefined,
            mean=float(self._moments.mean[0]) if self.samples else None,
            first_quartile=self.quantile(0.25),
            median=self.quantile(0.5),
            third_quartile=self.quantile(0.75),
            low=self.low,
            high=self.high,
            histogram=self._counts.clone(),
        )

    def _order_statistic(self, rank: int) -> float:
        """The value of this rank (from 0), as if the values in a bin were spread evenly over it."""
        cumulative = self._counts.cumsum(0)
        index = int(torch.searchsorted(cumulative, rank, right=True))
        inside = int(self._counts[index])
        place = (rank - (int(cumulative[index]) - inside) + 0.5) / inside
        value = self.low + (index + place) * (self.high - self.low) / self.bins
        return min(max(value, float(self._moments.minimum[0])), float(self._moments.maximum[0]))


# ---- Mean, variance and range of columns in one pass, without cancellation


class Moments:
    """Mergeable count, mean, population variance, minimum and maximum of each column.

    Batches are combined by the pairwise update of Chan, Golub and LeVeque (1979), so a mean that is large
    beside the deviation costs no digits. All state is float64 on the CPU.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean: Float[Tensor, "columns"] = torch.zeros(columns, dtype=torch.float64)
        self.minimum: Float[Tensor, "columns"] = torch.full((columns,), torch.inf, dtype=torch.float64)
        self.maximum: Float[Tensor, "columns"] = torch.full((columns,), -torch.inf, dtype=torch.float64)
        self._squares = torch.zeros(columns, dtype=torch.float64)

    def update(self, values: Float[Tensor, "batch columns"]) -> None:
        """Add rows.

        Raises:
            StatisticsError: another number of columns, or a value that is nan or infinite.
        """
        if values.shape[1] != len(self.mean):
            raise StatisticsError(f"rows of {values.shape[1]} columns given to moments of {len(self.mean)}")
        if not len(values):
            return
        values = values.to("cpu", torch.float64)
        low, high = values.aminmax(dim=0)
        finite = torch.isfinite(low) & torch.isfinite(high)
        if not finite.all():
            raise StatisticsError(f"column {int((~finite).nonzero()[0])} holds a value that is nan or infinite")
        mean = values.mean(dim=0)
        self._combine(len(values), mean, (values - mean).square().sum(dim=0), low, high)

    def merge(self, other: "Moments") -> "Moments":
        """Add what ``other`` has seen; returns self.

        Raises:
            StatisticsError: the other counts another number of columns.
        """
        if len(other.mean) != len(self.mean):
            raise StatisticsError(f"moments of {len(other.mean)} columns merged into moments of {len(self.mean)}")
        if other.count:
            self._combine(other.count, other.mean, other._squares, other.minimum, other.maximum)
        return self

    @property
    def constant(self) -> Bool[Tensor, "columns"]:
        """Columns that have shown at most one value; exact, unlike a test of the variance for zero."""
        return self.minimum >= self.maximum

    def variance(self) -> Float[Tensor, "columns"]:
        """Population variance; exactly 0 for constant columns, nan before the first row."""
        if not self.count:
            return torch.full_like(self.mean, torch.nan)
        return torch.where(self.constant, 0.0, self._squares / self.count)

    def _combine(self, count: int, mean: Tensor, squares: Tensor, minimum: Tensor, maximum: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self._squares = self._squares + squares + shift.square() * (self.count * count / total)
        self.minimum = torch.minimum(self.minimum, minimum)
        self.maximum = torch.maximum(self.maximum, maximum)
        self.count = total


# ---- Hoyer sparsity: how few entries carry a vector


def hoyer(vectors: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch"]:
    """Hoyer sparsity of each vector, (√d − ‖v‖₁/‖v‖₂)/(√d − 1) (Hoyer 2004; docs/method.md §4).

    Args:
        vectors: [..., channels], any floating type, any sign and scale.

    Returns:
        [...], float64 in [0, 1]: 0 for equal magnitudes, 1 for a single nonzero entry; nan where it is
        undefined: an all-zero vector, a vector with one channel only, or one that holds nan or infinity.
    """
    channels = vectors.shape[-1]
    if channels < 2:
        return torch.full(vectors.shape[:-1], torch.nan, dtype=torch.float64, device=vectors.device)
    magnitudes = vectors.to(torch.float64).abs()
    # Dividing by the largest entry keeps squares from overflowing or vanishing, and turns zero vectors into nan.
    magnitudes = magnitudes / magnitudes.amax(dim=-1, keepdim=True)
    ratio = magnitudes.sum(dim=-1) / magnitudes.square().sum(dim=-1).sqrt()
    return ((channels**0.5 - ratio) / (channels**0.5 - 1)).clamp(0, 1)


class HoyerStatistics:
    """Mergeable distribution of the Hoyer sparsity of vectors; undefined ones are counted, not averaged."""

    def __init__(self) -> None:
        self._distribution = DistributionAccumulator(0.0, 1.0)

    def update(self, vectors: Float[Tensor, "batch channels"]) -> None:
        """Add vectors."""
        self._distribution.update(hoyer(vectors))

    def merge(self, other: "HoyerStatistics") -> "HoyerStatistics":
        """Add what ``other`` has seen; returns self."""
        self._distribution.merge(other._distribution)
        return self

    def result(self) -> Distribution:
        """Mean and quartiles over all vectors so far."""
        return self._distribution.result()


# ---- E/I correlation: do the channels that push an output up also push it down?


def sign_correlation(
    positive: Float[Tensor, "batch channels"], negative: Float[Tensor, "batch channels"]
) -> Float[Tensor, "batch"]:
    """E/I correlation of each sample, −Pearson(negative, positive) across channels (docs/method.md §4).

    Args:
        positive: [batch, channels] positive parts, ≥ 0.
        negative: [batch, channels] negative parts, signed, ≤ 0.

    Returns:
        [batch], float64 in [−1, 1]: 1 where excitation and inhibition are balanced in every channel;
        nan where one of the two is the same in all channels.
    """
    if not positive.shape[1]:
        return torch.full((len(positive),), torch.nan, dtype=torch.float64)
    product = standardize(positive.to(torch.float64)) * standardize(negative.to(torch.float64))
    return -product.sum(dim=1).clamp(-1, 1)


class SignCorrelation:
    """Mergeable distribution of the E/I correlation over samples."""

    def __init__(self) -> None:
        self._distribution = DistributionAccumulator(-1.0, 1.0)

    def update(self, positive: Float[Tensor, "batch channels"], negative: Float[Tensor, "batch channels"]) -> None:
        """Add samples by their positive and (signed) negative parts."""
        self._distribution.update(sign_correlation(positive, negative))

    def merge(self, other: "SignCorrelation") -> "SignCorrelation":
        """Add what ``other`` has seen; returns self."""
        self._distribution.merge(other._distribution)
        return self

    def result(self) -> Distribution:
        """Mean and quartiles over all samples so far."""
        return self._distribution.result()


# ---- Class means: how many dimensions they span, and how classes resemble each other


@dataclass(frozen=True)
class ClassMeansResult:
    """Class-mean vectors and what follows from them; classes without samples take no part."""

    class_samples: Int[Tensor, "classes"]
    means: Float[Tensor, "classes channels"]
    """Mean vector of each class; nan for a class without samples."""
    class_correlation: Float[Tensor, "classes classes"]
    """Pearson correlation of class means across channels; nan without samples or for a constant mean."""
    cumulative_variance: Float[Tensor, "components"]
    """Fraction of the variance of the class means in the first 1, 2, … principal components; empty if undefined."""
    components_95: int | None
    """Principal components that hold 95 % of that variance; None with fewer than two different means."""
    participation_ratio: float | None
    """(Σλ)²/Σλ² of the variances λ of the principal components; None as above."""


class ClassMeans:
    """Mergeable sums per class, float64 on the CPU; memory classes × channels."""

    def __init__(self, channels: int, classes: int) -> None:
        self._samples = torch.zeros(classes, dtype=torch.int64)
        self._sums = torch.zeros(classes, channels, dtype=torch.float64)

    def update(self, values: Float[Tensor, "batch channels"], labels: Int[Tensor, "batch"]) -> None:
        """Add samples; those with label −1 are skipped.

        Raises:
            StatisticsError: another number of channels, or a label that is no class.
        """
        classes, channels = self._sums.shape
        if values.shape[1] != channels:
            raise StatisticsError(f"rows of {values.shape[1]} channels given to class means of {channels}")
        labels = labels.to("cpu", torch.int64)
        wrong = labels[(labels < -1) | (labels >= classes)]
        if len(wrong):
            raise StatisticsError(f"label {int(wrong[0])} found where there are {classes} classes (-1: no label)")
        labelled = labels >= 0
        self._sums.index_add_(0, labels[labelled], values.to("cpu", torch.float64)[labelled])
        self._samples += torch.bincount(labels[labelled], minlength=classes)

    def merge(self, other: "ClassMeans") -> "ClassMeans":
        """Add what ``other`` has seen; returns self.

        Raises:
            StatisticsError: the other has other numbers of classes or channels.
        """
        if other._sums.shape != self._sums.shape:
            raise StatisticsError(f"class means {tuple(other._sums.shape)} merged into {tuple(self._sums.shape)}")
        self._samples = self._samples + other._samples
        self._sums = self._sums + other._sums
        return self

    def result(self) -> ClassMeansResult:
        """Means, their dimensionality and their correlations, of all that was added so far."""
        means = self._sums / self._samples[:, None]
        rows = standardize(means)
        spectrum = _variances(means[self._samples > 0])
        cumulative = spectrum.cumsum(0) / spectrum.sum()
        defined = len(spectrum) > 0
        # A fraction that is 95 % but for rounding counts as reached.
        reached = int((cumulative < VARIANCE_FRACTION - 1e-12).sum()) + 1
        return ClassMeansResult(
            class_samples=self._samples.clone(),
            means=means,
            class_correlation=(rows @ rows.T).clamp(-1, 1),
            cumulative_variance=cumulative,
            components_95=reached if defined else None,
            participation_ratio=float(spectrum.sum().square() / spectrum.square().sum()) if defined else None,
        )


def _variances(means: Float[Tensor, "classes channels"]) -> Float[Tensor, "components"]:
    """Variances along principal components, largest first; empty where all means are equal but for rounding."""
    if len(means) < 2:
        return means.new_zeros(0)
    singular = torch.linalg.svdvals(means - means.mean(dim=0))
    rounding = torch.finfo(means.dtype).eps * max(means.shape) * means.abs().max()
    if not len(singular) or singular[0] <= rounding:
        return means.new_zeros(0)
    return singular.square()[: len(means) - 1] / (len(means) - 1)


# ---- Rows of mean 0 and norm 1, whose dot products are Pearson correlations


def standardize(rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
    """Each row less its mean, divided by its norm; nan for a constant row (told exactly) or one that holds nan."""
    if not rows.numel():
        return torch.full_like(rows, torch.nan)
    low, high = rows.aminmax(dim=1, keepdim=True)
    rows = (rows - low) / (high - low)  # in [0, 1]: no square can overflow or vanish; 0/0 for constant rows
    rows = rows - rows.mean(dim=1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True)
