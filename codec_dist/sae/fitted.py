"""What baselines that are fitted, not trained by gradient, share."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.arithmetic import mean_square
from codec_dist.sae.base import Loss, SparseAutoencoder
from codec_dist.sae.errors import SaeError


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
