"""Class means: how many dimensions they span, and how classes resemble each other."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.statistics.errors import StatisticsError
from codec_dist.statistics.standardize import standardize

VARIANCE_FRACTION = 0.95


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
