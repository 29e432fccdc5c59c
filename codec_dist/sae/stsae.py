"""The SAE of the CODEC paper (Melander et al. 2026, arXiv 2603.06557): sigmoid loadings, thresholded."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.sae.autoencoder import ARCHITECTURES, Loss, SparseAutoencoder, check_whole, count_modes


@ARCHITECTURES.register("stsae")
class StsaeAutoencoder(SparseAutoencoder):
    """A deep encoder with sigmoid codes, zeroed below a threshold, and a dictionary without bias or norm.

        c = sigmoid(encoder(x)),   z = c · 1[c ≥ τ] (the mask is constant),   x̂ = z D
        encoder: [Linear, Dropout, ReLU, LayerNorm] twice, then Linear without bias
        loss = mean (x − x̂)² + λ · mean |D|

    The bare recipe of the paper: a mode whose code stays below τ gets no gradient, and at the start very
    few codes reach .9, so on small data most modes may never fire.
    """

    architecture = "stsae"

    def __init__(
        self,
        channels: int,
        modes: int | None = None,
        expansion: int | float = 3,
        threshold: int | float = 0.9,
        hidden: int | None = None,
        hidden_per_channel: int | float | None = None,
        l1: int | float = 5e-5,
        dropout: int | float = 0.05,
        nonnegative: bool = False,
    ) -> None:
        """Build with PyTorch's default weights in the encoder and Xavier-uniform ones in the dictionary.

        Args:
            channels: width of the rows.
            modes: rows of the dictionary; default: ``expansion`` × channels.
            expansion: modes per channel (the paper's N), where ``modes`` is not given.
            threshold: codes below τ are 0.
            hidden: width of the encoder; default: ``hidden_per_channel`` × channels if given, else 2048.
            hidden_per_channel: width of the encoder per channel.
            l1: λ, the weight of mean |D|.
            dropout: fraction of hidden units dropped in training.
            nonnegative: use ReLU(D) as the dictionary.
        """
        super().__init__(channels, count_modes(channels, modes, expansion))
        if hidden is not None and hidden_per_channel is not None:
            raise ValueError("give hidden or hidden_per_channel, not both")
        check_whole(hidden=hidden)
        if hidden is None:
            hidden = 2048 if hidden_per_channel is None else round(hidden_per_channel * channels)
        if hidden < 1 or not 0 <= dropout < 1 or not 0 <= threshold <= 1 or l1 < 0:
            raise ValueError("hidden must be ≥ 1, dropout in [0, 1), threshold in [0, 1] and l1 ≥ 0")
        self.threshold, self.l1, self.dropout, self.nonnegative = threshold, l1, dropout, nonnegative
        self.options = {"modes": self.modes, "threshold": threshold, "hidden": hidden, "l1": l1}
        self.options |= {"dropout": dropout, "nonnegative": nonnegative}
        self.first, self.first_norm = nn.Linear(channels, hidden), nn.LayerNorm(hidden)
        self.second, self.second_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.codes = nn.Linear(hidden, self.modes, bias=False)
        self.decoder = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.modes, channels)))

    @property
    def dictionary(self) -> Float[Tensor, "modes channels"]:
        return self._atoms().detach()

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        hidden = self.first_norm(self._drop(self.first(rows)).relu())
        hidden = self.second_norm(self._drop(self.second(hidden)).relu())
        codes = self.codes(hidden).sigmoid()
        return codes * (codes >= self.threshold)

    def decode_scaled(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        return loadings @ self._atoms()

    def loss(self, rows: Float[Tensor, "batch channels"]) -> Loss:
        rows = rows / self.scale
        reconstruction = (rows - self.decode_scaled(self.encode_scaled(rows))).square().mean()
        sparsity = self.decoder.abs().mean()
        parts = {"reconstruction": reconstruction.detach(), "dictionary_l1": sparsity.detach()}
        return Loss(reconstruction + self.l1 * sparsity, parts)

    def _atoms(self) -> Float[Tensor, "modes channels"]:
        return self.decoder.relu() if self.nonnegative else self.decoder

    def _drop(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch hidden"]:
        # Not nn.Dropout, which draws from the global generator and so would tie SAEs trained together.
        if not self.training or self.dropout == 0:
            return hidden
        kept = torch.empty_like(hidden).bernoulli_(1 - self.dropout, generator=self.noise)
        return hidden * kept.div_(1 - self.dropout)
