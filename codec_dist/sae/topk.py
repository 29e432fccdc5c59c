"""TopK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from codec_dist.sae.autoencoder import ARCHITECTURES, Loss, SparseAutoencoder, check_whole, count_modes

MEDIAN_ITERATIONS = 50
SMALLEST_NORM = 1e-12


@ARCHITECTURES.register("topk")
class TopKAutoencoder(SparseAutoencoder):
    """The k largest of the rectified preactivations, a unit-norm dictionary and a bias of the rows.

        a = (x − b) Eᵀ + c,   z = TopK(ReLU(a)),   x̂ = z D + b,   ‖D_m‖ = 1

    The loss is mean (x − x̂)² + α · mean (e − ê)², with e = x − x̂ (detached) and ê = z′ D made of the
    ``auxk`` strongest *dead* modes, those that have not fired for ``dead_window`` samples (AuxK). There a
    rectified preactivation passes its gradient on even where it is 0: otherwise a mode that is negative
    for every row could never return. The errors are not divided by their variance as in the paper: rows
    have unit variance already, and what dead modes receive passes through Adam, which ignores its scale.

    Start: E = D (tied), rows of D random directions, b the geometric median of the first rows, c = 0.
    """

    architecture = "topk"
    samples_since_fired: Int[Tensor, "modes"]

    def __init__(
        self,
        channels: int,
        modes: int | None = None,
        expansion: int | float = 3,
        k: int = 8,
        auxk: int | None = None,
        auxk_coefficient: int | float = 1 / 32,
        dead_window: int = 10_000,
    ) -> None:
        """Build with random directions.

        Args:
            channels: width of the rows.
            modes: rows of the dictionary; default: ``expansion`` × channels.
            expansion: modes per channel, where ``modes`` is not given.
            k: loadings ≠ 0 per row, at most.
            auxk: dead modes that help per row; default: half the channels; 0 turns AuxK off.
            auxk_coefficient: weight α of the auxiliary loss.
            dead_window: a mode that has not fired for so many samples is dead.
        """
        super().__init__(channels, count_modes(channels, modes, expansion))
        check_whole(k=k, auxk=auxk, dead_window=dead_window)
        auxk = max(1, channels // 2) if auxk is None else auxk
        if not 1 <= k <= self.modes:
            raise ValueError(f"k must lie between 1 and the number of modes, {self.modes}; found {k}")
        if auxk < 0 or dead_window < 1 or auxk_coefficient < 0:
            raise ValueError("auxk and auxk_coefficient must be ≥ 0, and dead_window ≥ 1")
        self.k, self.auxk, self.auxk_coefficient, self.dead_window = (
            k,
            min(auxk, self.modes),
            auxk_coefficient,
            dead_window,
        )
        self.options = {"modes": self.modes, "k": k, "auxk": auxk}
        self.options |= {"auxk_coefficient": auxk_coefficient, "dead_window": dead_window}
        self.decoder = nn.Parameter(_unit_rows(torch.randn(self.modes, channels)))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(self.modes))
        self.decoder_bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("samples_since_fired", torch.zeros(self.modes, dtype=torch.int64))
        # How often each mode fired in the last batch, and how many rows that had.
        self.statistics = torch.zeros(self.modes + 1)

    @property
    def dictionary(self) -> Float[Tensor, "modes channels"]:
        return self.decoder.detach()

    @property
    def dead(self) -> Bool[Tensor, "modes"]:
        """Which modes have not fired during the last ``dead_window`` training samples."""
        return self.samples_since_fired >= self.dead_window

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        return self._strongest(self._preactivations(rows))

    def decode_scaled(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        return torch.addmm(self.decoder_bias, loadings, self.decoder)

    def loss(self, rows: Float[Tensor, "batch channels"]) -> Loss:
        rows = rows / self.scale
        preactivations = self._preactivations(rows)
        loadings = self._strongest(preactivations)
        error = rows - self.decode_scaled(loadings)
        with torch.no_grad():
            self.statistics[:-1] = (loadings > 0).sum(0)
            self.statistics[-1] = len(rows)
        reconstruction = error.square().mean()
        parts = {"reconstruction": reconstruction.detach()}
        auxiliary = self._auxiliary_loss(preactivations, error.detach())
        if auxiliary is None:
            return Loss(reconstruction, parts)
        parts["auxiliary"] = auxiliary.detach()
        return Loss(reconstruction + self.auxk_coefficient * auxiliary, parts)

    @torch.no_grad()
    def before_step(self) -> None:
        """Take out of each dictionary row's gradient the part along the row, which the norm would undo."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad.addcmul_(along, self.decoder, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM))
        self.samples_since_fired += self.statistics[-1].long()
        self.samples_since_fired.masked_fill_(self.statistics[:-1] > 0, 0)

    def _preactivations(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        return torch.addmm(self.encoder_bias, rows - self.decoder_bias, self.encoder.T)

    def _strongest(self, preactivations: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch modes"]:
        values, modes = preactivations.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(preactivations).scatter(1, modes, values.relu())

    def _auxiliary_loss(
        self, preactivations: Float[Tensor, "batch modes"], error: Float[Tensor, "batch channels"]
    ) -> Float[Tensor, ""] | None:
        dead = self.dead
        # On a CPU the answer is at hand; elsewhere asking would stall the device, so the loss is computed and zeroed.
        if self.auxk == 0 or (dead.device.type == "cpu" and not dead.any()):
            return None
        values, modes = preactivations.masked_fill(~dead, -torch.inf).topk(self.auxk, dim=1, sorted=False)
        values = values.masked_fill(values.isneginf(), 0)
        rectified = values + (values.relu() - values).detach()
        rectified = rectified * dead[modes]
        approximation = torch.zeros_like(preactivations).scatter(1, modes, rectified) @ self.decoder
        return (error - approximation).square().mean() * dead.any()

    def _start_from(self, scaled_rows: Float[Tensor, "rows channels"]) -> None:
        self.decoder_bias.copy_(geometric_median(scaled_rows))


def geometric_median(rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "channels"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration in float64."""
    points = rows.double()
    median = points.mean(0)
    for _ in range(MEDIAN_ITERATIONS):
        weights = 1 / torch.linalg.vector_norm(points - median, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        median = (weights * points).sum(0) / weights.sum()
    return median.to(rows.dtype)


def _unit_rows(vectors: Float[Tensor, "modes channels"]) -> Float[Tensor, "modes channels"]:
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
