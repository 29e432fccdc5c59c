"""SAEs that take every training step together, on one rank or many."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from codec_dist.sae import Joined, TrainedAutoencoder
from codec_dist.training.collectives import Ranks
from codec_dist.training.units import Flat, Unit

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Lockstep:
    """One optimizer and one gradient exchange for many SAEs, some of which are stacked in one computation.

    Where ranks share batches, all gradients lie in one buffer, followed by the statistics that SAEs gather over
    a batch (which modes fired). A step is: losses, one backward pass, one sum of the buffer over the ranks, one
    fused Adam step for all SAEs of one rate. Losses are means over rows, so weighting each rank by its share of
    the global batch makes the sum the gradient of the whole batch: the result is that of one process, to rounding.
    With ``divide`` each rank holds a part of every dictionary and sees all rows instead, and nothing but
    what the SAEs themselves exchange has to be summed.

    Why not one DistributedDataParallel per SAE: twelve small SAEs would mean twelve exchanges per step,
    each mostly latency; DDP averages ranks as if their shares were equal, which a last short batch breaks;
    and AuxK's counts need an exchange of their own beside it.

    Adam is called as a function: an instance of torch.optim.Adam imports the compiler, which takes seconds.

    Nothing in a step waits for the device; training losses add up there until they are asked for.
    """

    rates: list[float]
    """The learning rate of each SAE."""
    steps: int
    """How many were taken."""

    def __init__(
        self,
        saes: Sequence[TrainedAutoencoder],
        learning_rates: Sequence[float],
        ranks: Ranks,
        *,
        stacks: Sequence[Sequence[int]] | None = None,
        clips: Sequence[float | None] | None = None,
        autocast: bool = False,
        divide: bool = False,
    ) -> None:
        """Take over SAEs, the parameters of which move into one piece of memory.

        Args:
            saes: all on the device of ``ranks``, those to be divided on the CPU.
            learning_rates: Adam's step size for each.
            ranks: those that train together.
            stacks: numbers of SAEs that are computed together, every SAE in one stack; default: each alone.
            clips: largest norm of each SAE's gradient; None: any.
            autocast: compute matrix products in bfloat16 where the device is CUDA.
            divide: spread dictionaries over the ranks.
        """
        self.learning_rates, self.rates = list(learning_rates), list(learning_rates)
        self._ranks, self._divide, self.steps = ranks, divide and ranks.size > 1, 0
        groups = [[number] for number in range(len(saes))] if stacks is None or divide else stacks
        self.units = [Unit(group, [saes[number] for number in group], ranks, divide=divide) for group in groups]
        self._buffer = _share_memory(self.units, summed=ranks.size > 1 and not divide)
        self._autocast = autocast and self._buffer.device.type == "cuda"
        self._limits = [self._limit(unit, clips) for unit in self.units]
        self._losses = [
            torch.zeros(len(unit.numbers), dtype=torch.float64, device=self._buffer.device) for unit in self.units
        ]
        self._rows = 0
        if not self._divide:
            for unit in self.units:
                self._ranks.broadcast_(unit.values)

    def set_rates(self, factors: Sequence[float]) -> None:
        """Multiply the learning rate by one factor per SAE from now on."""
        self.rates = [rate * factor for rate, factor in zip(self.learning_rates, factors, strict=True)]

    def step(self, batches: Sequence[Float[Tensor, "share channels"]], global_rows: int) -> None:
        """One step of every SAE.

        Args:
            batches: for each of ``units`` this rank's share of the batch (maybe none of it).
            global_rows: rows of the batch over all ranks.
        """
        self._buffer.zero_()
        for unit in self.units:
            unit.clear_gradients()
        share = len(batches[0])
        with self._precision():
            losses = [unit.losses(rows, global_rows) for unit, rows in zip(self.units, batches, strict=True)]
        # On ranks without rows too: some losses are found by all ranks together.
        (torch.cat(losses).sum() * (share / global_rows)).backward()
        for total, loss in zip(self._losses, losses, strict=True):
            total.add_(loss.detach(), alpha=share)
        self._rows += global_rows
        if not self._divide:
            self._ranks.sum_(self._buffer)
        for unit, limits in zip(self.units, self._limits, strict=True):
            unit.module.before_step()
            if limits is not None:
                norms = unit.squared_gradients().sqrt()
                unit.scale_gradients((limits / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1))
        self.steps += 1
        for rate, pieces in self._by_rate().items():
            self._adam(pieces, rate)
        for unit in self.units:
            unit.module.after_step()

    def seed_noise(self, seeds: Sequence[int]) -> None:
        """Draw the randomness of each SAE from a stream of its own."""
        for unit in self.units:
            unit.seed_noise([seeds[number] for number in unit.numbers])

    def resample(self, unit: Unit, rows: Float[Tensor, "rows channels"], seeds: Sequence[int]) -> None:
        """Start dead modes of a unit's SAEs anew; ``rows`` are the same on every rank."""
        unit.resample(rows, seeds)
        if not self._divide:
            # Rounding may let ranks draw different rows, after which they would be different SAEs.
            self._ranks.broadcast_(unit.values)

    def pop_losses(self) -> tuple[list[float], int]:
        """Every SAE's training loss summed over the rows of all ranks since the last call, and how many these are.

        Waits for the device.
        """
        sums = torch.cat(self._losses)
        if not self._divide:
            self._ranks.sum_(sums)
        numbers = [number for unit in self.units for number in unit.numbers]
        found, rows = sorted(zip(numbers, sums.tolist(), strict=True)), self._rows
        for losses in self._losses:
            losses.zero_()
        self._rows = 0
        return [loss for _, loss in found], rows

    def saes(self) -> list[TrainedAutoencoder]:
        """All SAEs, whole: stacked and divided ones as copies, the latter on the CPU. All ranks call it together."""
        pairs = [pair for unit in self.units for pair in zip(unit.numbers, unit.saes(), strict=True)]
        return [sae for _, sae in sorted(pairs, key=lambda pair: pair[0])]

    def coders(self, saes: Sequence[TrainedAutoencoder]) -> list[TrainedAutoencoder | Joined]:
        """What encodes and decodes on the device for each of ``saes``, which are what :meth:`saes` returned."""
        found: dict[int, TrainedAutoencoder | Joined] = {}
        for unit in self.units:
            found |= zip(unit.numbers, unit.coders([saes[number] for number in unit.numbers]), strict=True)
        return [found[number] for number in sorted(found)]

    def states(self) -> list[dict[str, Tensor]]:
        """Adam's state of each SAE, on the CPU. All ranks call it together."""
        pairs = [pair for unit in self.units for pair in zip(unit.numbers, unit.moments(), strict=True)]
        steps = self.steps
        return [{"step": torch.tensor(steps), **moments} for _, moments in sorted(pairs, key=lambda pair: pair[0])]

    def load_states(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Set Adam's state of every SAE; all must have taken equally many steps."""
        (self.steps,) = {int(state["step"]) for state in states}
        for unit in self.units:
            for member, number in enumerate(unit.numbers):
                unit.load_moments(member, states[number])

    def _limit(self, unit: Unit, clips: Sequence[float | None] | None) -> Tensor | None:
        own = [None if clips is None else clips[number] for number in unit.numbers]
        if all(clip is None for clip in own):
            return None
        return self._buffer.new_tensor([math.inf if clip is None else clip for clip in own])

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self._autocast else nullcontext()

    def _by_rate(self) -> dict[float, list[Flat]]:
        """What has the same rate; a stack as a whole where its members agree."""
        found: dict[float, list[Flat]] = {}
        for unit in self.units:
            rates = [self.rates[number] for number in unit.numbers]
            if len(set(rates)) == 1:
                found.setdefault(rates[0], []).extend(unit.whole())
                continue
            for member, rate in enumerate(rates):
                found.setdefault(rate, []).extend(unit.of_member(member))
        return found

    @torch.no_grad()
    def _adam(self, pieces: Sequence[Flat], rate: float) -> None:
        steps = self._buffer.new_full((len(pieces),), self.steps - 1, dtype=torch.float32)
        adam(
            [piece.values for piece in pieces],
            [piece.gradients for piece in pieces],
            exp_avgs=[piece.mean for piece in pieces],
            exp_avg_sqs=[piece.square for piece in pieces],
            max_exp_avg_sqs=[],
            state_steps=list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


def _share_memory(units: Sequence[Unit], *, summed: bool) -> Tensor:
    """Move all parameters into one vector, and what ranks sum into another, which is returned.

    That is all gradients, if these are ``summed``, and then all statistics.
    """
    first = next(units[0].module.parameters())
    elements = sum(unit.elements for unit in units)
    summed_elements = elements if summed else 0
    statistics = sum(unit.module.statistics.numel() for unit in units)
    values = torch.zeros(elements, dtype=first.dtype, device=first.device)
    buffer = torch.zeros(summed_elements + statistics, dtype=first.dtype, device=first.device)
    start, statistics_start = 0, summed_elements
    for unit in units:
        end, statistics_end = start + unit.elements, statistics_start + unit.module.statistics.numel()
        gradients = buffer[start:end] if summed else None
        unit.move_into(values[start:end], gradients, buffer[statistics_start:statistics_end])
        start, statistics_start = end, statistics_end
    return buffer
