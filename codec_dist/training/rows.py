"""The rows of one layer and quantity as training wants them: in memory where they fit, else streamed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.store import ContributionStore
from codec_dist.training.errors import TrainingError
from codec_dist.training.parts import Parts
from codec_dist.training.ranks import Ranks
from codec_dist.utils import derive_seed

CALIBRATION_ROWS = 4096
STREAMED_WINDOW_BYTES = 256 << 20


@dataclass(frozen=True)
class Calibration:
    """What an SAE starts from."""

    scale: float
    """Standard deviation over all elements of the fit rows."""
    rows: Float[Tensor, "rows channels"]
    """At most 4,096 fit rows, evenly spaced."""


class LayerRows:
    """One layer and quantity of a store, divided into the parts of the split.

    Fit rows come in *windows*, each a tensor in memory whose rows the caller shuffles: one window with all
    of them once ``load`` was called, else windows of about 256 MB of whole blocks, read in an order that
    is a pure function of the seed. Every rank sees the same windows, because a global batch is a slice of
    one permutation of which each rank takes its share. Held-out rows are this rank's share only.
    """

    def __init__(
        self,
        store: ContributionStore,
        layer: str,
        quantity: str,
        parts: Parts,
        ranks: Ranks,
        *,
        dtype: torch.dtype = torch.float32,
        window_bytes: int = STREAMED_WINDOW_BYTES,
    ) -> None:
        self._store, self._layer, self._quantity, self._dtype = store, layer, quantity, dtype
        self._ranks, self._window_bytes = ranks, window_bytes
        self._labels, self._rows_by_part = parts.labels, dict(parts.indices)
        for part in ("select", "evaluate"):
            self._rows_by_part[part] = parts.indices[part][ranks.share(len(parts.indices[part]))]
        self._resident: dict[str, Float[Tensor, "rows channels"]] = {}
        self._calibration: Calibration | None = None

    @property
    def fit_rows(self) -> int:
        """Rows of the fit part, on all ranks together."""
        return len(self._rows_by_part["fit"])

    @property
    def bytes(self) -> int:
        """What ``load`` would hold in memory."""
        rows = sum(map(len, self._rows_by_part.values()))
        return rows * self._store.layers[self._layer] * self._dtype.itemsize

    @property
    def resident(self) -> bool:
        """Whether all rows are held in memory."""
        return bool(self._resident)

    def load(self) -> None:
        """Hold all rows in memory, on the rank's device; does nothing the second time.

        Raises:
            TrainingError: a value that is NaN or infinite, or rows that are all equal.
        """
        if not self._resident:
            self._scan(keep=True)

    def unload(self) -> None:
        """Give the memory back."""
        self._resident = {}

    def calibration(self) -> Calibration:
        """Scale and first rows, from one pass over the fit rows (the same bits resident or streamed).

        Raises:
            TrainingError: a value that is NaN or infinite, or rows that are all equal.
        """
        if self._calibration is None:
            self._scan(keep=False)
        assert self._calibration is not None
        return self._calibration

    def windows(self, seed: int, epoch: int) -> Iterator[Float[Tensor, "window channels"]]:
        """The fit rows of one epoch; the caller permutes the rows of each window."""
        if self._resident:
            yield self._resident["fit"]
            return
        generator = torch.Generator().manual_seed(derive_seed(seed, "blocks", epoch))
        numbers = list(self._store.shard_numbers)
        order = [numbers[position] for position in torch.randperm(len(numbers), generator=generator).tolist()]
        limit = max(1, self._window_bytes // (self._store.layers[self._layer] * self._dtype.itemsize))
        window: list[Tensor] = []
        held = 0
        for _, values in self._pieces("fit", order):
            window.append(values)
            held += len(values)
            if held >= limit:
                yield torch.cat(window)
                window, held = [], 0
        if window:
            yield torch.cat(window)

    def held_out(self, part: str) -> Iterator[tuple[Float[Tensor, "rows channels"], Tensor]]:
        """The share of this rank in a part's rows, and their labels, piece by piece; every row once."""
        if self._resident:
            labels = self._labels[torch.from_numpy(self._rows_by_part[part])]
            pieces = max(1, math.ceil(len(labels) / CALIBRATION_ROWS))
            yield from zip(self._resident[part].chunk(pieces), labels.chunk(pieces), strict=True)
            return
        for indices, values in self._pieces(part):
            yield values, self._labels[torch.from_numpy(indices)]

    def _pieces(self, part: str, shards: list[int] | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        rows = self._rows_by_part[part]
        for block in self._store.blocks(self._layer, self._quantity, shards):
            first, last = np.searchsorted(rows, [block.start, block.start + len(block.values)])
            if last > first:
                indices = rows[first:last]
                yield indices, self._tensor(block.values[indices - block.start]).to(self._ranks.device)

    def _scan(self, *, keep: bool) -> None:
        """One pass over the store: the calibration and, if asked, all rows."""
        spread = _Spread()
        stride = math.ceil(self.fit_rows / CALIBRATION_ROWS)
        samples: list[Tensor] = []
        kept = {part: self._empty(len(rows)) for part, rows in self._rows_by_part.items()} if keep else {}
        seen = 0
        for block in self._store.blocks(self._layer, self._quantity):
            for part, rows in self._rows_by_part.items():
                first, last = np.searchsorted(rows, [block.start, block.start + len(block.values)])
                values = self._tensor(block.values[rows[first:last] - block.start])
                if not values.isfinite().all():
                    self._refuse_values(rows[first:last], values)
                if keep:
                    kept[part][first:last] = values
                if part == "fit" and len(values):
                    spread.update(values)
                    samples.append(values[-seen % stride :: stride].to(self._ranks.device))
                    seen += len(values)
        deviation = spread.deviation()
        if not deviation > 0:
            raise TrainingError(
                f"{self._layer}, {self._quantity}: all values of the {self.fit_rows} fit rows are equal, so there is "
                "nothing to decompose; leave it out of sae.groups"
            )
        self._calibration = Calibration(deviation, torch.cat(samples))
        self._resident = kept

    def _empty(self, rows: int) -> Float[Tensor, "rows channels"]:
        return torch.empty(rows, self._store.layers[self._layer], device=self._ranks.device, dtype=self._dtype)

    def _tensor(self, values: np.ndarray) -> Float[Tensor, "rows channels"]:
        """On the CPU, in the type of the training."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._dtype)

    def _refuse_values(self, rows: np.ndarray, values: Tensor) -> None:
        row, channel = (~values.isfinite()).nonzero()[0].tolist()
        sample = self._store.samples.slice(int(rows[row]), 1).to_pylist()[0]
        raise TrainingError(
            f"{self._layer}, {self._quantity}: in {self._dtype}, sample {sample['shard']}/{sample['key']} holds "
            f"{values[row, channel].item()} in channel {channel}: extract the store again without that sample"
        )


class _Spread:
    """Standard deviation over elements, in float64, merged block by block (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        values = values.double()
        mean = values.mean().item()
        squares = (values - mean).square().sum().item()
        count, difference = values.numel(), mean - self._mean
        total = self._count + count
        self._squares += squares + difference**2 * self._count * count / total
        self._mean += difference * count / total
        self._count = total

    def deviation(self) -> float:
        return float(math.sqrt(self._squares / self._count)) if self._count else math.nan
