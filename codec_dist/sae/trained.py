"""What SAEs that are trained by gradient share: counts of who fired, AuxK and resampling."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from codec_dist.sae.arithmetic import mean_square, strongest
from codec_dist.sae.base import SparseAutoencoder, TrainedOptions

SMALLEST_NORM = 1e-12


class TrainedAutoencoder(SparseAutoencoder):
    """An SAE whose modes can die, and the remedies.

    ``statistics`` holds how often each mode fired in the last batch, then the rows of that batch, then
    ``extra_statistics`` sums of the architecture's own.

    AuxK (Gao et al. 2024, arXiv 2406.04093): mean (e − ê)², with e = x − x̂ (detached) and ê made of the
    ``auxk`` strongest *dead* modes. There a rectified preactivation passes its gradient on even where it is
    0: otherwise a mode that is negative for every row could never return. The errors are not divided by
    their variance as in the paper: rows have unit variance already, and what dead modes receive passes
    through Adam, which ignores its scale. In eval mode there is no such term: held-out losses before and after
    a mode is declared dead can be compared.
    """

    option_type = TrainedOptions
    settings: TrainedOptions
    extra_statistics: ClassVar[int] = 0
    samples_since_fired: Int[Tensor, "*members modes"]
    """Training samples since each mode fired."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        assert self.settings.auxk is not None
        self.auxk: int = self.settings.auxk
        self.auxk_coefficient: float | Tensor = self.settings.auxk_coefficient
        self.nonnegative = self.settings.nonnegative
        self.register_buffer("samples_since_fired", torch.zeros(self.modes, dtype=torch.int64))
        self.statistics = torch.zeros(self.modes + 1 + self.extra_statistics)

    @property
    def dead(self) -> Bool[Tensor, "*members modes"]:
        """Which modes have not fired during the last ``dead_window`` training samples."""
        return self.samples_since_fired >= self.settings.dead_window

    @torch.no_grad()
    def after_step(self) -> None:
        """Count for how many samples each mode has been silent."""
        modes = self.samples_since_fired.shape[-1]
        self.samples_since_fired += self.statistics[..., modes : modes + 1].long()
        self.samples_since_fired.masked_fill_(self.statistics[..., :modes] > 0, 0)

    def take_members(self, name: str, values: Sequence[Any]) -> None:
        """Become a stack in the attribute ``name``: a number for all members, or a tensor where they differ."""
        setattr(self, name, values[0])
        if len(set(values)) > 1:
            delattr(self, name)
            like = next(self.parameters())
            self.register_buffer(name, torch.tensor(values, dtype=like.dtype, device=like.device), persistent=False)

    @torch.no_grad()
    def resample(
        self, rows: Float[Tensor, "*members batch channels"], seed: int | Sequence[int]
    ) -> Bool[Tensor, "*members modes"]:
        """Reinitialise dead modes from the residuals of badly reconstructed rows.

        Rows are drawn with probability ∝ (squared error)², each once while there are enough (Bricken et al.
        2023, "Towards Monosemanticity", which takes the rows themselves).

        Args:
            rows: in stored units, the same on every process.
            seed: of the draw; one per member of a stack.

        Returns:
            Which modes were reinitialised. Their moments in the optimizer belong to other modes: see
            :func:`forget_moments`.
        """
        training = self.training
        self.eval()
        scaled = self.scaled(rows)
        errors = scaled - self.decode_scaled(self.encode_scaled(scaled))
        self.train(training)
        dead = self.dead
        before = self.mode_group.gather(dead.sum(-1))[: self.mode_group.rank].sum(0)
        number = (dead.cumsum(-1) - 1 + before[..., None]).clamp(min=0) % errors.shape[-2]
        picked = _draw(errors.square().sum(-1), seed).gather(-1, number)
        self.reinitialize(dead, scaled, picked, pick_rows(errors, picked))
        self.samples_since_fired.masked_fill_(dead, 0)
        return dead

    def reinitialize(
        self,
        dead: Bool[Tensor, "*members modes"],
        scaled_rows: Float[Tensor, "*members batch channels"],
        picked: Int[Tensor, "*members modes"],
        residuals: Float[Tensor, "*members modes channels"],
    ) -> None:
        """Set the parameters of ``dead`` modes, given for every mode a row's number and its residual."""
        raise NotImplementedError

    @property
    def _flips(self) -> bool:
        return self.settings.nonnegative

    @torch.no_grad()
    def record_firing(self, loadings: Float[Tensor, "*members batch modes"]) -> None:
        modes = loadings.shape[-1]
        self.statistics[..., :modes] = (loadings > 0).sum(-2)
        self.statistics[..., modes] = loadings.shape[-2]

    def _auxiliary_loss(
        self, candidates: Float[Tensor, "*members batch modes"], errors: Float[Tensor, "*members batch channels"]
    ) -> Float[Tensor, "*members"] | None:
        """AuxK; None where it is off, not training, or known without asking a device that no mode is dead."""
        if self.auxk == 0 or not self.training:
            return None
        dead = self.dead
        # On a CPU the answer is at hand; elsewhere asking would stall the device, so the loss is computed and zeroed.
        if dead.device.type == "cpu" and self.mode_group.size == 1 and not dead.any():
            return None
        return self._explained(candidates, dead, self.atoms(), errors)

    def _explained(
        self,
        candidates: Float[Tensor, "*members batch some"],
        dead: Bool[Tensor, "*members some"],
        atoms: Float[Tensor, "*members some channels"],
        errors: Float[Tensor, "*members batch channels"],
    ) -> Float[Tensor, "*members"]:
        """What is left of the errors once the strongest dead ones of some modes explain what they can."""
        values, modes = strongest(
            candidates.masked_fill(~dead.unsqueeze(-2), -torch.inf), self.auxk, modes=self.mode_group
        )
        values = values.masked_fill(values.isneginf(), 0)
        rectified = values + (values.relu() - values).detach()
        own = torch.zeros_like(candidates).scatter(-1, modes, rectified) @ atoms
        any_dead = self.mode_group.gather(dead.any(-1)).any(0)
        return mean_square(errors.detach() - self.mode_group.sum(own)) * any_dead


@torch.no_grad()
def forget_moments(
    sae: SparseAutoencoder, modes: Bool[Tensor, "*members modes"], moments: Mapping[str, Tensor]
) -> None:
    """Zero an optimizer's running moments of some modes, in place.

    Args:
        sae: the SAE (or the template of a stack), for what belongs to a mode.
        modes: which ones, as ``resample`` returns them.
        moments: a tensor for each of the SAE's named parameters, of the parameter's shape.
    """
    for name in sae.mode_parameters:
        if name in moments:
            moment = moments[name]
            moment.masked_fill_(modes.view(*modes.shape, *[1] * (moment.ndim - modes.ndim)), 0)


def pick_rows(
    rows: Float[Tensor, "*members batch width"], numbers: Int[Tensor, "*members picked"]
) -> Float[Tensor, "*members picked width"]:
    """Rows by number, for each member its own."""
    return rows.gather(-2, numbers[..., None].expand(*numbers.shape, rows.shape[-1]))


def unit_rows(vectors: Float[Tensor, "*members modes channels"]) -> Float[Tensor, "*members modes channels"]:
    """Vectors divided by their norms; zeros stay zeros."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)


def _draw(losses: Float[Tensor, "*members batch"], seed: int | Sequence[int]) -> Int[Tensor, "*members batch"]:
    """All rows in an order in which rows with a large loss tend to come first: draws ∝ loss², without replacement."""
    seeds = [seed] if isinstance(seed, int) else list(seed)
    noise = [
        torch.rand(losses.shape[-1], generator=torch.Generator().manual_seed(each), dtype=torch.float64)
        for each in seeds
    ]
    # The Gumbel trick: adding this noise to log weights and sorting is drawing by the weights.
    gumbel = -torch.log(-torch.log(torch.stack(noise).clamp(1e-300, 1 - 1e-16))).to(losses.device)
    return (2 * losses.double().clamp_min(1e-300).log() + gumbel.view(losses.shape)).argsort(-1, descending=True)
