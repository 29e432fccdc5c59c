"""SAEs that take every training step together, on one rank or many."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from codec_dist.sae import SparseAutoencoder
from codec_dist.training.ranks import Ranks

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Lockstep:
    """One optimizer and one gradient exchange for many SAEs.

    All gradients lie in one buffer, followed by the statistics that SAEs gather over a batch (which modes
    fired). A step is: losses, one backward pass, one sum of the buffer over the ranks, one fused Adam step
    for all SAEs of one rate. Losses are means over rows, so weighting each rank by its share of the global
    batch makes the sum the gradient of the whole batch: the result is that of one process, to rounding.

    Why not one DistributedDataParallel per SAE: twelve small SAEs would mean twelve exchanges per step,
    each mostly latency; DDP averages ranks as if their shares were equal, which a last short batch breaks;
    and AuxK's counts need an exchange of their own beside it.

    Adam is called as a function: an instance of torch.optim.Adam imports the compiler, which takes seconds.

    Nothing in a step waits for the device; training losses add up there until they are asked for.
    """

    rates: list[float]
    """The learning rate of each SAE."""

    def __init__(self, saes: Sequence[SparseAutoencoder], learning_rate: float, ranks: Ranks) -> None:
        self.saes, self.learning_rate, self._ranks = list(saes), learning_rate, ranks
        self.rates = [learning_rate] * len(self.saes)
        self._buffer, self._vectors, self._gradients = _flatten(self.saes)
        self._states = [_fresh_state(vector) for vector in self._vectors]
        self._losses = torch.zeros(len(self.saes), dtype=torch.float64, device=self._buffer.device)
        self._rows = 0

    def set_rates(self, factors: Sequence[float]) -> None:
        """Multiply the learning rate by one factor per SAE from now on."""
        self.rates = [self.learning_rate * factor for factor in factors]

    def step(self, batches: Sequence[Float[Tensor, "share channels"]], global_rows: int) -> None:
        """One step of every SAE.

        Args:
            batches: for each SAE this rank's share of the batch (maybe none of it).
            global_rows: rows of the batch over all ranks.
        """
        self._buffer.zero_()
        share = len(batches[0])
        if share:
            weight = share / global_rows
            totals = [sae.loss(rows).total for sae, rows in zip(self.saes, batches, strict=True)]
            loss = torch.stack(totals)
            (loss.sum() * weight).backward()
            self._losses.add_(loss.detach(), alpha=share)
        self._rows += global_rows
        self._ranks.sum_(self._buffer)
        for sae in self.saes:
            sae.before_step()
        for rate in sorted(set(self.rates)):
            self._adam([number for number, one in enumerate(self.rates) if one == rate], rate)
        for sae in self.saes:
            sae.after_step()

    def pop_losses(self) -> list[float]:
        """Mean training loss per row of every SAE since the last call, over all ranks; waits for the device."""
        losses = self._ranks.sum_(self._losses.clone()).tolist()
        rows = max(self._rows, 1)
        self._losses.zero_()
        self._rows = 0
        return [loss / rows for loss in losses]

    def state(self, index: int) -> dict[str, Tensor]:
        """Adam's moments of one SAE, on the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in self._states[index].items()}

    def load_state(self, index: int, state: dict[str, Tensor]) -> None:
        """Set Adam's moments of one SAE."""
        self._states[index] = {name: tensor.to(self._buffer.device).clone() for name, tensor in state.items()}

    @torch.no_grad()
    def _adam(self, numbers: Sequence[int], rate: float) -> None:
        states = [self._states[number] for number in numbers]
        adam(
            [self._vectors[number] for number in numbers],
            [self._gradients[number] for number in numbers],
            exp_avgs=[state["mean"] for state in states],
            exp_avg_sqs=[state["square"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


def _fresh_state(vector: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=vector.device)
    return {"mean": torch.zeros_like(vector), "square": torch.zeros_like(vector), "step": step}


def _flatten(saes: Sequence[SparseAutoencoder]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Move parameters, gradients and statistics into flat memory, of which they become views.

    Returns the buffer of all gradients and statistics, and per SAE the vector of its parameters and of its
    gradients.
    """
    first = next(saes[0].parameters())
    parameters = [parameter for sae in saes for parameter in sae.parameters()]
    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
    statistics = sum(sae.statistics.numel() for sae in saes)
    buffer = torch.zeros(len(values) + statistics, dtype=first.dtype, device=first.device)
    vectors: list[Tensor] = []
    gradients: list[Tensor] = []
    start, statistics_start = 0, len(values)
    for sae in saes:
        beginning = start
        for parameter in sae.parameters():
            end = start + parameter.numel()
            parameter.data = values[start:end].view_as(parameter)
            parameter.grad = buffer[start:end].view_as(parameter)
            start = end
        vectors.append(values[beginning:start])
        gradients.append(buffer[beginning:start])
        statistics_end = statistics_start + sae.statistics.numel()
        sae.statistics = buffer[statistics_start:statistics_end]
        statistics_start = statistics_end
    return buffer, vectors, gradients
