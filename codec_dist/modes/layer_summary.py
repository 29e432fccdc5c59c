"""One pass over the rows of a layer: correlations of modes and of raw channels, and the best images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int8, Int64
from torch import Tensor

from codec_dist.modes.errors import ModesError
from codec_dist.sae import SparseAutoencoder
from codec_dist.statistics import Moments

PARTS = ("fit", "select", "evaluate")
SELECT, EVALUATE = PARTS.index("select"), PARTS.index("evaluate")
ROWS_AT_ONCE = 1024

ROWS_COMPARED_AT_ONCE = 128


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


class PartCorrelations:
    """Mergeable correlations on *select*, where top modes are chosen, and on *evaluate*, which is reported."""

    def __init__(self, modes: int, classes: int) -> None:
        self._select, self._evaluate = LoadingCorrelations(modes, classes), LoadingCorrelations(modes, classes)

    def update(
        self, loadings: Float[Tensor, "batch modes"], labels: Int[Tensor, "batch"], parts: Int[Tensor, "batch"]
    ) -> None:
        """Add samples; ``parts`` are indices into ``PARTS``."""
        for part, accumulator in ((SELECT, self._select), (EVALUATE, self._evaluate)):
            inside = parts == part
            accumulator.update(loadings[inside], labels[inside])

    def merge(self, other: "PartCorrelations") -> "PartCorrelations":
        """Add what ``other`` has seen; returns self."""
        self._select.merge(other._select)
        self._evaluate.merge(other._evaluate)
        return self

    def result(self) -> tuple[Correlations, Correlations]:
        """Correlations on *select* and on *evaluate*."""
        return self._select.result(), self._evaluate.result()


@dataclass(frozen=True, eq=False)
class TopLoadings:
    """The highest loadings of each mode, ordered by mode and rank."""

    mode: Int64[np.ndarray, "kept"]
    rank: Int64[np.ndarray, "kept"]
    """0 is the highest."""
    sample: Int64[np.ndarray, "kept"]
    """Index of the sample."""
    loading: Float64[np.ndarray, "kept"]


class LayerSummary:
    """Mergeable summary of one quantity of one layer: raw channels always, modes where there is an SAE.

    Args:
        channels: channels of the layer.
        modes: modes of its SAE; None where there is none.
        classes: number of classes; 0 where nothing is labelled.
        images: how many top images of each mode are kept.
    """

    def __init__(self, channels: int, modes: int | None, classes: int, images: int) -> None:
        self.channels = PartCorrelations(channels, classes)
        self.modes = None if modes is None else PartCorrelations(modes, classes)
        self._top_images = TopImages(modes or 0, images)

    def update(
        self,
        rows: Float[Tensor, "batch channels"],
        labels: Int[Tensor, "batch"],
        parts: Int8[Tensor, "batch"],
        samples: Int[Tensor, "batch"],
        sae: SparseAutoencoder | None = None,
    ) -> None:
        """Add rows in stored units; rows of *fit* are left out.

        Args:
            rows: values of the quantity.
            labels: class of each row; −1 where there is none.
            parts: index into ``PARTS`` of each row; −1 for rows in no part.
            samples: index of each row among all samples.
            sae: the SAE of this layer and quantity, the same in every call.

        Raises:
            ModesError: a label that is no class, other numbers of channels or modes, or an SAE that is
                missing or not expected.
            StatisticsError: a value that is nan or infinite.
        """
        if (sae is None) != (self.modes is None):
            raise ModesError("an SAE is given where none is expected, or missing where one is")
        wanted = (parts == SELECT) | (parts == EVALUATE)
        for start in range(0, int(wanted.sum()), ROWS_AT_ONCE):
            selected = wanted.nonzero()[start : start + ROWS_AT_ONCE, 0]
            self._add(rows[selected], labels[selected], parts[selected], samples[selected], sae)

    def merge(self, other: "LayerSummary") -> "LayerSummary":
        """Add what ``other`` has seen; returns self.

        Raises:
            ModesError: the other has other numbers of channels, modes, classes or images.
        """
        if (self.modes is None) != (other.modes is None):
            raise ModesError("a summary with modes and one without cannot be merged")
        self._top_images.merge(other._top_images)
        self.channels.merge(other.channels)
        if self.modes is not None and other.modes is not None:
            self.modes.merge(other.modes)
        return self

    def top_images(self) -> TopLoadings:
        """The highest loadings on *evaluate*."""
        return self._top_images.result()

    def _add(self, rows: Tensor, labels: Tensor, parts: Tensor, samples: Tensor, sae: SparseAutoencoder | None) -> None:
        self.channels.update(rows, labels, parts)
        if sae is None or self.modes is None:
            return
        with torch.inference_mode():
            loadings = sae.encode(rows.to(sae.dictionary.dtype))
        self.modes.update(loadings, labels, parts)
        evaluate = parts == EVALUATE
        self._top_images.update(loadings[evaluate], samples[evaluate])


def part_codes(names: np.ndarray) -> Int8[Tensor, "samples"]:
    """Names of parts as indices into ``PARTS``; −1 for any other."""
    codes = np.full(len(names), -1, np.int8)
    for code, name in enumerate(PARTS):
        codes[names == name] = code
    return torch.from_numpy(codes)


# ---- Correlation of every loading with every class, exact in one pass without storing loadings


class LoadingCorrelations:
    """Mergeable sums from which the correlation of each loading with each class mask follows exactly.

    corr(c, m) = (S_cm/n − p_c·μ_m) / (√(p_c(1−p_c))·σ_m), with S_cm the sum of loading m over the samples of
    class c, n the labelled rows, σ the population deviation (docs/method.md §5). Unlabelled rows count for the
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


# ---- The samples that load highest on each mode


class TopImages:
    """Mergeable table of the ``count`` highest positive loadings of each mode.

    Equal loadings are ordered by sample index, so the result depends on neither batches nor their order.
    Only entries above a mode's lowest kept loading are ever sorted, and memory is modes × count.
    """

    def __init__(self, modes: int, count: int) -> None:
        self.modes, self.count = modes, count
        self._mode = np.zeros(0, np.int64)
        self._sample = np.zeros(0, np.int64)
        self._loading = np.zeros(0, np.float64)
        self._floor = np.zeros(modes)

    def update(self, loadings: Float[Tensor, "batch modes"], samples: Int[Tensor, "batch"]) -> None:
        """Add loadings of samples, which are told apart by their index (each is given once).

        Raises:
            ModesError: another number of modes.
        """
        if loadings.shape[1] != self.modes:
            raise ModesError(f"loadings of {loadings.shape[1]} modes given where there are {self.modes}")
        values, numbers = loadings.detach().cpu().double().numpy(), samples.cpu().numpy()
        # In small steps, because the first ones raise the floor that spares the others from being sorted.
        for start in range(0, len(values), ROWS_COMPARED_AT_ONCE):
            step = values[start : start + ROWS_COMPARED_AT_ONCE]
            row, mode = np.nonzero((step > 0) & (step >= self._floor))
            self._keep(mode, numbers[start + row], step[row, mode])

    def merge(self, other: "TopImages") -> "TopImages":
        """Add what ``other`` has kept; returns self.

        Raises:
            ModesError: the other has another number of modes or keeps another number of images.
        """
        if (other.modes, other.count) != (self.modes, self.count):
            raise ModesError(
                f"the top {other.count} images of {other.modes} modes merged into "
                f"the top {self.count} of {self.modes} modes"
            )
        self._keep(other._mode, other._sample, other._loading)
        return self

    def result(self) -> "TopLoadings":
        """The kept loadings, ordered by mode and rank."""
        return TopLoadings(self._mode, self._ranks(self._mode), self._sample, self._loading)

    def _keep(self, mode: np.ndarray, sample: np.ndarray, loading: np.ndarray) -> None:
        mode = np.concatenate([self._mode, mode])
        sample = np.concatenate([self._sample, sample])
        loading = np.concatenate([self._loading, loading])
        order = np.lexsort((sample, -loading, mode))
        kept = order[self._ranks(mode[order]) < self.count]
        self._mode, self._sample, self._loading = mode[kept], sample[kept], loading[kept]
        last = self._ranks(self._mode) == self.count - 1
        self._floor[self._mode[last]] = self._loading[last]

    @staticmethod
    def _ranks(mode: np.ndarray) -> np.ndarray:
        """Place of each entry among those of its mode, where entries are ordered by mode."""
        return np.arange(len(mode)) - np.searchsorted(mode, mode)
