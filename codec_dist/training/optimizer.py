"""SAEs that take every training step together, on one rank or many: their computations, and one Adam for all."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.adam import adam

from codec_dist.sae import (
    Joined,
    ProcessGroup,
    SparseAutoencoder,
    StackedAutoencoder,
    TopKAutoencoder,
    TrainedAutoencoder,
    forget_moments,
    shard,
    unshard,
    whole_on_host,
)
from codec_dist.training.collectives import Ranks
from codec_dist.utils import hash_json

# Elements from one parameter's start to the next one's are a multiple of this, so that arithmetic on one SAE
# does not depend on which others lie before it in memory.
ALIGNMENT = 16

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Flat(NamedTuple):
    """What Adam needs of some parameters, as tensors of one shape."""

    values: Tensor
    gradients: Tensor
    mean: Tensor
    square: Tensor


class Unit:
    """One or more SAEs that share a computation; ``numbers`` are their places among all that are trained."""

    def __init__(
        self, numbers: Sequence[int], saes: Sequence[TrainedAutoencoder], ranks: Ranks, *, divide: bool
    ) -> None:
        self.numbers = tuple(numbers)
        self.module: TrainedAutoencoder | StackedAutoencoder
        self._together = ranks.size > 1 and not divide
        if divide and ranks.size > 1:
            self.module = shard(saes[0], ProcessGroup()).to(ranks.device)
        elif len(saes) > 1:
            self.module = StackedAutoencoder(saes)
        else:
            self.module = saes[0]
        if self._together:
            self.module.row_group = ProcessGroup()
        self._places: dict[str, slice] = {}
        start = 0
        for name, parameter in self.template.named_parameters():
            self._places[name] = slice(start, start + parameter.numel())
            start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.elements = start
        """Numbers of all parameters, with what lies unused between them."""

    @property
    def template(self) -> TrainedAutoencoder:
        """The SAE, or the one whose tensors have a leading dimension of members."""
        return self.module.template if isinstance(self.module, StackedAutoencoder) else self.module

    @torch.no_grad()
    def move_into(self, values: Tensor, gradients: Tensor | None, statistics: Tensor) -> None:
        """Let parameters, statistics and, if there is memory for them, gradients be views of this flat memory.

        It holds zeros. Without memory of their own gradients stay where the backward pass makes them, which saves
        an addition to zeros as large as the dictionary.
        """
        self.values, self._gradients = values, gradients
        self._mean, self._square = torch.zeros_like(values), torch.zeros_like(values)
        for name, parameter in self.template.named_parameters():
            shape, place = parameter.shape, self._places[name]
            values[place] = parameter.flatten()
            parameter.data = values[place].view(shape)
            parameter.grad = None if gradients is None else gradients[place].view(shape)
        self.module.statistics = statistics.view(self.module.statistics.shape)

    def clear_gradients(self) -> None:
        """Forget the last step's gradients, where they have no memory of their own."""
        if self._gradients is None:
            for parameter in self.template.parameters():
                parameter.grad = None

    def losses(self, rows: Float[Tensor, "share channels"], batch_rows: int | None = None) -> Float[Tensor, "members"]:
        """The loss of each SAE."""
        return self.module.loss(rows, batch_rows).total.reshape(-1)

    def seed_noise(self, seeds: Sequence[int]) -> None:
        """Draw the randomness of each SAE from a stream of its own."""
        if isinstance(self.module, StackedAutoencoder):
            self.module.seed_noise(seeds)
        else:
            self.module.seed_noise(seeds[0])

    @torch.no_grad()
    def resample(self, rows: Float[Tensor, "rows channels"], seeds: Sequence[int]) -> Bool[Tensor, "*members modes"]:
        """Reinitialise dead modes, without their past in the optimizer; which ones."""
        if isinstance(self.module, StackedAutoencoder):
            modes = self.module.resample(rows, seeds)
        else:
            modes = self.module.resample(rows, seeds[0])
        for moments in (self._mean, self._square):
            forget_moments(self.template, modes, self._by_name(moments))
        return modes

    @torch.no_grad()
    def squared_gradients(self) -> Float[Tensor, "members"]:
        """The squared norm of each SAE's gradient."""
        own = shared = torch.zeros(len(self.numbers), device=self.values.device, dtype=self.values.dtype)
        for name, gradient in self._by_gradient().items():
            squares = gradient.view(len(self.numbers), -1).square().sum(1)
            if name in self.template.mode_parameters:
                own = own + squares
            else:
                shared = shared + squares
        return self.template.mode_group.sum(own) + shared

    @torch.no_grad()
    def scale_gradients(self, factors: Float[Tensor, "members"]) -> None:
        """Multiply each SAE's gradient by a number."""
        for gradient in self._by_gradient().values():
            gradient.view(len(self.numbers), -1).mul_(factors[:, None])

    def whole(self) -> list[Flat]:
        """The memory of all members: in one piece if gradients are, else parameter by parameter."""
        if self._gradients is None:
            return self._pieces()
        return [Flat(self.values, self._gradients, self._mean, self._square)]

    def of_member(self, member: int) -> list[Flat]:
        """The memory of one member, parameter by parameter."""
        return [Flat(*(each.view(len(self.numbers), -1)[member] for each in piece)) for piece in self._pieces()]

    def saes(self) -> list[TrainedAutoencoder]:
        """The SAEs, whole and each by itself; divided ones on the CPU, for which all ranks must call it."""
        if isinstance(self.module, StackedAutoencoder):
            return self.module.unstack()
        return [unshard(self.module) if self._divided else self.module]

    def coders(self, saes: Sequence[TrainedAutoencoder]) -> list[TrainedAutoencoder | Joined]:
        """What encodes and decodes on the device for ``saes``, which are this unit's whole ones."""
        return [Joined(self.module)] if self._divided and not isinstance(self.module, StackedAutoencoder) else [*saes]

    def moments(self) -> list[dict[str, Tensor]]:
        """Adam's moments of each SAE by name, of whole dictionaries, on the CPU; for all ranks as ``saes``."""
        found: list[dict[str, Tensor]] = [{} for _ in self.numbers]
        for kind, moments in (("mean", self._mean), ("square", self._square)):
            for name, moment in self._by_name(moments).items():
                members = moment if isinstance(self.module, StackedAutoencoder) else self._whole(name, moment)[None]
                for own, member in zip(found, members, strict=True):
                    own[f"{kind}.{name}"] = member.cpu().clone()
        return found

    @torch.no_grad()
    def load_moments(self, member: int, moments: dict[str, Tensor]) -> None:
        """Set Adam's moments of one SAE."""
        for kind, own_moments in (("mean", self._mean), ("square", self._square)):
            for name, moment in self._by_name(own_moments).items():
                own = moment[member] if isinstance(self.module, StackedAutoencoder) else moment
                given = moments[f"{kind}.{name}"]
                if self._divided and name in self.template.mode_parameters:
                    given = given[self.template.first_mode :][: len(own)]
                own.copy_(given)

    @property
    def _divided(self) -> bool:
        return self.template.mode_group.size > 1

    def _pieces(self) -> list[Flat]:
        parts = [self._by_gradient(), self._by_name(self._mean), self._by_name(self._square)]
        return [
            Flat(parameter.detach(), *(part[name] for part in parts))
            for name, parameter in self.template.named_parameters()
        ]

    def _by_gradient(self) -> dict[str, Tensor]:
        """Gradients by name; zeros for what took no part in the loss."""
        found = {}
        for name, parameter in self.template.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found[name] = parameter.grad
        return found

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[self._places[name]].view(parameter.shape) for name, parameter in self.template.named_parameters()
        }

    def _whole(self, name: str, moment: Tensor) -> Tensor:
        """A moment of the whole dictionary, from that of the modes of this rank."""
        if not self._divided or name not in self.template.mode_parameters:
            return moment
        return whole_on_host(self.template, moment)


def group_alike(saes: Sequence[SparseAutoencoder], kinds: Sequence[object]) -> list[list[int]]:
    """Which SAEs can be stacked, as lists of their numbers: those of equal ``kinds`` and shape.

    What may differ is what their architecture names in ``member_options``. On a CPU, TopK SAEs of different k
    stay apart, because only stacks of one k compute by sparse products.
    """
    groups: dict[str, list[int]] = {}
    for number, (sae, kind) in enumerate(zip(saes, kinds, strict=True)):
        may_differ = set(sae.member_options)
        if sae.statistics.device.type == "cpu" and isinstance(sae, TopKAutoencoder) and sae.same_in_every_row:
            may_differ -= {"k"}
        options = {name: value for name, value in sae.options.items() if name not in may_differ}
        key = hash_json([str(kind), sae.architecture, sae.channels, options])
        groups.setdefault(key, []).append(number)
    return list(groups.values())


# ---- SAEs that take every training step together, on one rank or many


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
        """Reinitialise dead modes of a unit's SAEs; ``rows`` are the same on every rank."""
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
