"""An architecture that the package does not know, for tests that name it by its import path."""

from dataclasses import dataclass

from torch import Tensor

from codec_dist.sae import LinearAutoencoder


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(LinearAutoencoder.option_type):  # type: ignore[name-defined,misc]
    """Options of the architecture."""

    threshold: float = 0.1
    """Preactivations up to this one count as 0."""


class ThresholdAutoencoder(LinearAutoencoder):
    """z = a · 1[a > θ], loss = mean (x − x̂)²."""

    architecture = "threshold"
    option_type = ThresholdOptions

    def activate(self, preactivations: Tensor, batch_rows: int) -> Tensor:
        """The loadings."""
        return preactivations * (preactivations > self.settings.threshold)


PLAIN_FUNCTION = len
