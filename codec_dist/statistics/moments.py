"""Mean, variance and range of columns in one pass, without cancellation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from codec_dist.statistics.errors import StatisticsError


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
