"""ReLU with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity"; Cunningham et al., arXiv 2309.08600)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from codec_dist.sae.base import ARCHITECTURES
from codec_dist.sae.linear import LinearAutoencoder, LinearOptions


@dataclass(frozen=True, kw_only=True)
class ReluOptions(LinearOptions):
    """Options of ``relu``."""

    l1: int | float = 0.1
    """Weight λ of the L1 norm of the loadings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 < 0:
            raise ValueError(f"l1 must not be negative, found {self.l1}")


@ARCHITECTURES.register("relu")
class ReluAutoencoder(LinearAutoencoder):
    """z = ReLU(a), loss = mean (x − x̂)² + λ · Σ_m z_m ‖D_m‖ / √channels.

    The penalty shrinks loadings: an isolated mode of a row with norm √channels loses λ/2 of that norm.
    """

    architecture = "relu"
    option_type = ReluOptions
    settings: ReluOptions
    member_options = (*LinearAutoencoder.member_options, "l1")
    # Small, so that revived modes do not disturb the reconstruction at once (Bricken et al.).
    resampled_gain = 0.2

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.l1: float | Tensor = self.settings.l1

    def activate(
        self, preactivations: Float[Tensor, "*members batch modes"], batch_rows: int
    ) -> Float[Tensor, "*members batch modes"]:
        return preactivations.relu()

    def penalties(
        self,
        rows: Float[Tensor, "*members batch channels"],
        preactivations: Float[Tensor, "*members batch modes"],
        loadings: Float[Tensor, "*members batch modes"],
    ) -> dict[str, tuple[float | Tensor, Tensor]]:
        return {"l1": (self.l1, self.magnitudes(loadings))}
