"""SAEs as the computations that train them: one alone, several stacked, or this rank's part of a divided one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
        """Start dead modes anew, without their past in the optimizer; which ones."""
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
