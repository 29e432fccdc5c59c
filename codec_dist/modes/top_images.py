"""The samples that load highest on each mode."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from codec_dist.modes.errors import ModesError

ROWS_AT_ONCE = 128


@dataclass(frozen=True, eq=False)
class TopLoadings:
    """The highest loadings of each mode, ordered by mode and rank."""

    mode: Int64[np.ndarray, "kept"]
    rank: Int64[np.ndarray, "kept"]
    """0 is the highest."""
    sample: Int64[np.ndarray, "kept"]
    """Index of the sample."""
    loading: Float64[np.ndarray, "kept"]


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
        for start in range(0, len(values), ROWS_AT_ONCE):
            step = values[start : start + ROWS_AT_ONCE]
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
