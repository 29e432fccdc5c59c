"""The SAE of the CODEC paper (Melander et al. 2026, arXiv 2603.06557): sigmoid loadings, thresholded."""

from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from codec_dist.sae.arithmetic import affine, mean_square, wide
from codec_dist.sae.base import ARCHITECTURES, Loss, TrainedOptions
from codec_dist.sae.trained import TrainedAutoencoder, pick_rows

PAPER_HIDDEN = 2048
# Deviation of a mode's logits over rows after `initial_l0`: near the threshold sigmoids still have a slope.
LOGIT_SPREAD = 2.0
# A resampled mode's logit lies this far above the threshold's for its row, and this far below for the mean row.
RESTART_ABOVE, RESTART_BELOW = 1.0, 3.0
RESTART_GAIN = 0.05


@dataclass(frozen=True, kw_only=True)
class StsaeOptions(TrainedOptions):
    """Options of ``stsae``."""

    threshold: int | float = 0.9
    """Codes below τ are 0."""
    hidden: int | None = None
    """Width of the encoder; default: `hidden_per_channel` times the channels if given, else 2048 (the paper)."""
    hidden_per_channel: int | float | None = None
    """Width of the encoder per channel."""
    l1: int | float = 5e-5
    """Weight λ of the mean absolute value of the dictionary (nonnegative: of relu(D))."""
    dropout: int | float = 0.05
    """Fraction of hidden units dropped in training."""
    initial_l0: int | float | None = None
    """Modes that fire per row at the start, on average; default: as random weights have it (the paper: almost none)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None and self.hidden_per_channel is not None:
            raise ValueError("give hidden or hidden_per_channel, not both")
        positive = self.hidden is None or self.hidden >= 1
        if not positive or not 0 <= self.dropout < 1 or not 0 <= self.threshold <= 1 or self.l1 < 0:
            raise ValueError("hidden must be ≥ 1, dropout in [0, 1), threshold in [0, 1] and l1 ≥ 0")
        if self.initial_l0 is not None and not 0 < self.initial_l0 < (self.modes or float("inf")):
            raise ValueError(f"initial_l0 must lie between 0 and the number of modes, found {self.initial_l0}")
        if (self.initial_l0 is not None or self.resample_every is not None) and not 0 < self.threshold < 1:
            raise ValueError("initial_l0 and resample_every need a threshold between 0 and 1")

    def resolve(self, channels: int) -> "StsaeOptions":
        hidden = self.hidden
        if hidden is None:
            hidden = PAPER_HIDDEN if self.hidden_per_channel is None else round(self.hidden_per_channel * channels)
        resolved = super().resolve(channels)
        assert isinstance(resolved, StsaeOptions)
        return replace(resolved, hidden=hidden, hidden_per_channel=None)


@ARCHITECTURES.register("stsae")
class StsaeAutoencoder(TrainedAutoencoder):
    """A deep encoder with sigmoid codes, zeroed below a threshold, and a dictionary without bias or norm.

        c = sigmoid(encoder(x)),   z = c · 1[c ≥ τ] (the mask is constant),   x̂ = z D
        encoder: [Linear, Dropout, ReLU, LayerNorm] twice, then Linear without bias
        loss = mean (x − x̂)² + λ · mean |D|   (nonnegative: relu(D) in the place of D, here and in x̂)

    With the options' defaults this is the bare recipe of the paper: a mode whose code stays below τ gets no
    gradient, and at the start very few codes reach .9, so on small data most modes may never fire. Against
    that, ``initial_l0`` sets the codes' weights so that every mode fires for a share of rows from the start;
    AuxK lets the strongest codes of dead modes explain the residual; resampling reinitialises them.
    """

    architecture = "stsae"
    option_type = StsaeOptions
    settings: StsaeOptions
    mode_parameters = ("codes.weight", "decoder")
    member_options = ("threshold", "l1", "auxk_coefficient")

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        hidden = self.settings.hidden
        assert hidden is not None
        self.threshold: float | Tensor = self.settings.threshold
        self.l1: float | Tensor = self.settings.l1
        self.dropout = self.settings.dropout
        self.first, self.first_norm = nn.Linear(channels, hidden), nn.LayerNorm(hidden)
        self.second, self.second_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.codes = nn.Linear(hidden, self.modes, bias=False)
        self.decoder = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.modes, channels)))

    def atoms(self) -> Float[Tensor, "*members modes channels"]:
        return self.decoder.relu() if self.nonnegative else self.decoder

    def encode_scaled(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        return self._mask(self._codes(rows))

    def decode_scaled(
        self, loadings: Float[Tensor, "*members batch modes"]
    ) -> Float[Tensor, "*members batch channels"]:
        return self.mode_group.sum(loadings @ self.atoms())

    def loss(self, rows: Float[Tensor, "*members batch channels"], batch_rows: int | None = None) -> Loss:
        rows = self.scaled(rows)
        codes = self._codes(rows)
        loadings = self._mask(codes)
        self.record_firing(loadings)
        errors = rows - self.decode_scaled(loadings)
        elements = self.modes * self.channels
        sparsity = self.mode_group.sum(self.atoms().abs().sum((-2, -1))) / elements
        terms = {"reconstruction": (1.0, mean_square(errors)), "dictionary_l1": (self.l1, sparsity)}
        auxiliary = self._auxiliary_loss(codes, errors)
        if auxiliary is not None:
            terms["auxiliary"] = (self.auxk_coefficient, auxiliary)
        return Loss.weighted(terms)

    def _mask(self, codes: Float[Tensor, "*members batch modes"]) -> Float[Tensor, "*members batch modes"]:
        return codes * (codes >= wide(self.threshold))

    def _codes(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        hidden = self.mode_group.copy(self._hidden(rows))
        return (hidden @ self.codes.weight.mT).sigmoid()

    def _hidden(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch hidden"]:
        for linear, norm in ((self.first, self.first_norm), (self.second, self.second_norm)):
            hidden = self._drop(affine(linear.bias, rows, linear.weight)).relu()
            normal = layer_norm(hidden, hidden.shape[-1:], eps=norm.eps)
            rows = normal * norm.weight.unsqueeze(-2) + norm.bias.unsqueeze(-2)
        return rows

    def _drop(self, hidden: Float[Tensor, "*members batch hidden"]) -> Float[Tensor, "*members batch hidden"]:
        # Not nn.Dropout, which draws from the global generator and so would tie SAEs trained together.
        if not self.training or self.dropout == 0:
            return hidden
        kept = torch.empty_like(hidden)
        if isinstance(self.noise, list):
            for member, generator in zip(kept, self.noise, strict=True):
                member.bernoulli_(1 - self.dropout, generator=generator)
        else:
            kept.bernoulli_(1 - self.dropout, generator=self.noise)
        return hidden * kept.div_(1 - self.dropout)

    def _start_from(self, scaled_rows: Float[Tensor, "rows channels"]) -> None:
        if self.settings.initial_l0 is None:
            return
        training = self.training
        self.eval()
        hidden = self._hidden(scaled_rows)
        self.train(training)
        logit = self._logit()
        assert isinstance(logit, float)  # a stack is made of SAEs that have started
        self.codes.weight.copy_(firing_weights(hidden, self.codes.weight, self.settings.initial_l0, logit))

    def _logit(self) -> float | Tensor:
        """The threshold as a logit, shaped to go with [members, modes]."""
        if isinstance(self.threshold, Tensor):
            return self.threshold.logit().unsqueeze(-1)
        return log(self.threshold / (1 - self.threshold))

    def reinitialize(
        self,
        dead: Bool[Tensor, "*members modes"],
        scaled_rows: Float[Tensor, "*members batch channels"],
        picked: Int[Tensor, "*members modes"],
        residuals: Float[Tensor, "*members modes channels"],
    ) -> None:
        training = self.training
        self.eval()
        hidden = self._hidden(scaled_rows)
        self.train(training)
        mean = hidden.mean(-2, keepdim=True)
        direction = pick_rows(hidden, picked) - mean
        # The shortest weights with the two stated logits: along the mean, and along what is special in the row.
        along = (direction * mean).sum(-1) / mean.square().sum(-1)
        special = direction - along.unsqueeze(-1) * mean
        low = self._logit() - RESTART_BELOW
        rise = RESTART_ABOVE + RESTART_BELOW - low * along
        weights = mean * (low / mean.square().sum(-1)).unsqueeze(-1)
        weights = weights + special * (rise / special.square().sum(-1).clamp_min(1e-12)).unsqueeze(-1)
        rows = RESTART_GAIN * (residuals.relu() if self.nonnegative else residuals)
        self.codes.weight.copy_(torch.where(dead[..., None], weights, self.codes.weight))
        self.decoder.copy_(torch.where(dead[..., None], rows, self.decoder))


def firing_weights(
    hidden: Float[Tensor, "rows hidden"], weights: Float[Tensor, "modes hidden"], fired: int | float, logit: float
) -> Float[Tensor, "modes hidden"]:
    """Weights with which ``fired`` modes per row have logits above ``logit``, each mode for as many rows.

    Each mode keeps the direction of its weights up to a multiple of the mean hidden vector, which shifts its
    logits (nearly alike for all rows), and a factor, which gives them a deviation of ``LOGIT_SPREAD``. Every
    mode fires for at least one row.
    """
    hidden, weights = hidden.double(), weights.double()
    mean = hidden.mean(0)
    shift = (hidden @ mean / mean.square().sum()).unsqueeze(-1)
    logits = hidden @ weights.T
    factor = LOGIT_SPREAD / logits.std(0, correction=0).clamp_min(1e-12)
    counts = _share_out(fired * len(hidden), len(weights), len(hidden)).to(hidden.device)
    # The shift from which on a row fires; a row with a negative share of the mean would fire ever less.
    needed = ((logit - logits * factor) / shift).masked_fill(shift <= 0, torch.inf)
    least = needed.topk(min(int(counts.max()) + 1, len(hidden)), dim=0, largest=False).values
    # Halfway between the last row that is to fire and the next.
    last, following = (least.gather(0, place[None])[0] for place in (counts - 1, counts.clamp(max=len(least) - 1)))
    offset = torch.where(following.isfinite(), (last + following) / 2, last)
    return weights * factor[:, None] + (offset / mean.square().sum())[:, None] * mean


def _share_out(total: int | float, modes: int, most: int) -> Int[Tensor, "modes"]:
    """Whole numbers from 1 to ``most``, as equal as can be, with the sum ``total`` (rounded) if that is possible."""
    each, left = divmod(round(total), modes)
    return (each + (torch.arange(modes) < left)).clamp(1, most)
