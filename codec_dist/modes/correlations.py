"""Correlation of every loading with every class, exact in one pass without storing loadings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.modes.errors import ModesError
from codec_dist.statistics import Moments


@dataclass(frozen=True)
class Correlations:
    """What loadings say about classes over some window of samples.

    ``rows`` counts all samples, labelled or not, ``samples`` the labelled ones (the n of the correlations).
    """

    rows: int
    samples: int
    class_samples: Int[Tensor, "classes"]
    """Labelled samples of each class."""
    frequency: Float[Tensor, "modes"]
    """Fraction of all rows on which the mode is on (loading ≠ 0); nan without rows."""
    mean_when_on: Float[Tensor, "modes"]
    """Mean loading over the rows on which the mode is on; nan for a dead mode."""
    correlation: Float[Tensor, "classes modes"]
    """Pearson correlation with the class mask; nan for a constant loading, and for a class with no or all rows."""

    def of_groups(self, groups: Sequence[Sequence[int]]) -> Float[Tensor, "groups modes"]:
        """Correlation with masks that are unions of classes (concepts, superclasses).

        Exact: covariances with masks of disjoint classes add up, so with p the fraction of samples,
        r(group) = Σ r(class)·√(p(1−p)) / √(P(1−P)), P = Σ p. A class listed twice counts once.

        Raises:
            ModesError: a class that does not exist.
        """
        classes, modes = self.correlation.shape
        fraction = self.class_samples.double() / max(self.samples, 1)
        scale = (fraction * (1 - fraction)).clamp(min=0).sqrt()
        result = torch.full((len(groups), modes), torch.nan, dtype=torch.float64)
        for row, group in enumerate(groups):
            members = sorted(set(group))
            if members and not 0 <= members[0] <= members[-1] < classes:
                raise ModesError(f"a concept lists class {members[0]} or {members[-1]}: there are {classes} classes")
            inside = int(self.class_samples[members].sum())
            if 0 < inside < self.samples:
                present = [index for index in members if self.class_samples[index]]
                whole = inside / self.samples
                covariance = (self.correlation[present] * scale[present, None]).sum(dim=0)
                result[row] = (covariance / (whole * (1 - whole)) ** 0.5).clamp(-1, 1)
        return result


class LoadingCorrelations:
    """Mergeable sums from which the correlation of each loading with each class mask follows exactly.

    corr(c, m) = (S_cm/n − p_c·μ_m) / (√(p_c(1−p_c))·σ_m), with S_cm the sum of loading m over the samples of
    class c, n the labelled rows, σ the population deviation (METHOD §5). Unlabelled rows count for the
    frequency and mean of loadings only. All sums are float64 on the CPU; S_cm is kept of loadings less a
    reference near their mean, which changes nothing in the formula and avoids cancellation in it.
    """

    def __init__(self, modes: int, classes: int) -> None:
        self.modes, self.classes = modes, classes
        self._moments = Moments(modes)
        self._class_samples = torch.zeros(classes, dtype=torch.int64)
        self._reference = torch.zeros(modes, dtype=torch.float64)
        self._class_sums = torch.zeros(classes, modes, dtype=torch.float64)
        self._rows = 0
        self._on = torch.zeros(modes, dtype=torch.int64)
        self._sums = torch.zeros(modes, dtype=torch.float64)

    def update(self, loadings: Float[Tensor, "batch modes"], labels: Int[Tensor, "batch"]) -> None:
        """Add samples; label −1 stands for none.

        Raises:
            ModesError: another number of modes, or a label that is no class.
            StatisticsError: a loading that is nan or infinite.
        """
        if loadings.shape[1] != self.modes:
            raise ModesError(f"loadings of {loadings.shape[1]} modes given where there are {self.modes}")
        if not len(loadings):
            return
        loadings, labels = loadings.to("cpu", torch.float64), labels.to("cpu", torch.int64)
        if not -1 <= int(labels.min()) <= int(labels.max()) < self.classes:
            wrong = labels[(labels < -1) | (labels >= self.classes)]
            raise ModesError(f"label {int(wrong[0])} found where there are {self.classes} classes (-1: no label)")
        self._rows += len(loadings)
        self._on += loadings.count_nonzero(dim=0)
        self._sums += loadings.sum(dim=0)
        if int(labels.min()) < 0:
            labelled = labels >= 0
            loadings, labels = loadings[labelled], labels[labelled]
        if not self._moments.count and len(loadings):
            self._reference = loadings.mean(dim=0)
        self._moments.update(loadings)
        self._class_samples += torch.bincount(labels, minlength=self.classes)
        self._class_sums.index_add_(0, labels, loadings - self._reference)

    def merge(self, other: "LoadingCorrelations") -> "LoadingCorrelations":
        """Add what ``other`` has seen; returns self.

        Raises:
            ModesError: the other has other numbers of modes or classes.
        """
        if (other.modes, other.classes) != (self.modes, self.classes):
            raise ModesError(
                f"correlations of {other.modes} modes with {other.classes} classes merged into "
                f"{self.modes} modes with {self.classes} classes"
            )
        if not self._moments.count:
            self._reference = other._reference
        shift = other._reference - self._reference
        self._class_sums = self._class_sums + other._class_sums + other._class_samples[:, None] * shift
        self._class_samples = self._class_samples + other._class_samples
        self._moments.merge(other._moments)
        self._rows += other._rows
        self._on = self._on + other._on
        self._sums = self._sums + other._sums
        return self

    def result(self) -> Correlations:
        """The correlations of all that was added so far."""
        samples = self._moments.count
        fraction = self._class_samples.double() / max(samples, 1)
        deviation = self._moments.variance().sqrt()
        # Every labelled row is in one class, so that the sum over classes is n·μ, referred as S_cm is.
        covariance = (self._class_sums - fraction[:, None] * self._class_sums.sum(dim=0)) / max(samples, 1)
        scale = (fraction * (1 - fraction)).sqrt()[:, None] * deviation
        undefined = ((self._class_samples == 0) | (self._class_samples == samples))[:, None] | self._moments.constant
        return Correlations(
            rows=self._rows,
            samples=samples,
            class_samples=self._class_samples.clone(),
            frequency=self._on.double() / self._rows if self._rows else torch.full_like(self._sums, torch.nan),
            mean_when_on=self._sums / self._on,
            correlation=(covariance / scale).clamp(-1, 1).masked_fill(undefined, torch.nan),
        )
