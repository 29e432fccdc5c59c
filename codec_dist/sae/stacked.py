"""Many SAEs of one shape in one batched computation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from codec_dist.sae.arithmetic import Group
from codec_dist.sae.base import Loss, differing
from codec_dist.sae.errors import SaeError
from codec_dist.sae.trained import TrainedAutoencoder


class StackedAutoencoder(nn.Module):
    """K SAEs of one architecture and shape, whose parameters are stacked along a leading dimension of members.

    Every matrix product becomes one batched product, and every elementwise step of an optimizer is the same
    for a stack as for its members, so training a stack is training its members, to the rounding of
    floating-point numbers. Members may differ in weights, scale, seeds, and in the options that their
    architecture names in ``member_options`` (sparsity, penalties, thresholds).

    Use it as an SAE with tensors that have a leading dimension: ``loss(rows).total`` has one entry per
    member, of which a trainer minimizes the sum. Rows may be [members, batch, channels], or [batch,
    channels] for all members alike.
    """

    def __init__(self, saes: Sequence[TrainedAutoencoder]) -> None:
        """Stack copies; the SAEs themselves are left as they are.

        Raises:
            SaeError: none, or SAEs that cannot be stacked.
        """
        super().__init__()
        _check(saes)
        first = saes[0]
        self.template = empty_like(first)
        states = [tensors_of(sae) for sae in saes]
        for name in states[0]:
            place(self.template, name, torch.stack([state[name] for state in states]))
        self._settings = [_settings(sae) for sae in saes]
        for name in ("scale", *first.member_options):
            self.template.take_members(name, [getattr(sae, name) for sae in saes])
        self.train(first.training)

    @property
    def members(self) -> int:
        """How many SAEs there are."""
        return len(self._settings)

    def unstack(self) -> list[TrainedAutoencoder]:
        """The members as SAEs of their own, with copies of the weights."""
        saes = []
        for number, settings in enumerate(self._settings):
            sae = empty_like(self.template, settings["options"])
            for name, tensor in tensors_of(self.template).items():
                place(sae, name, tensor[number].clone())
            for name in ("scale", "sign"):
                setattr(sae, name, settings[name])
            saes.append(sae.train(self.training))
        return saes

    def split(self, values: Float[Tensor, "values"]) -> list[Float[Tensor, "own"]]:
        """What each member has in a flat vector over all parameters (as an optimizer's moments), in its own order."""
        parts = values.split([parameter.numel() for parameter in self.parameters()])
        tables = [part.view(self.members, -1) for part in parts]
        return [torch.cat([table[number] for table in tables]) for number in range(self.members)]

    def join(self, members: Sequence[Float[Tensor, "own"]]) -> Float[Tensor, "values"]:
        """The opposite of ``split``."""
        sizes = [parameter.numel() // self.members for parameter in self.parameters()]
        tables = [member.split(sizes) for member in members]
        return torch.cat([torch.cat(parts) for parts in zip(*tables, strict=True)])

    # ---- as an SAE

    def encode(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "all batch modes"]:
        """Loadings of rows in stored units."""
        return self.template.encode(self._for_all(rows))

    def decode(self, loadings: Float[Tensor, "all batch modes"]) -> Float[Tensor, "all batch channels"]:
        """Rows in stored units from loadings."""
        return self.template.decode(loadings)

    def forward(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "all batch channels"]:
        """The reconstructions of rows, both in stored units."""
        return self.decode(self.encode(rows))

    def loss(self, rows: Float[Tensor, "*members batch channels"], batch_rows: int | None = None) -> Loss:
        """The training losses, one per member; records ``statistics``."""
        return self.template.loss(self._for_all(rows), batch_rows)

    @property
    def dictionary(self) -> Float[Tensor, "members modes channels"]:
        """The dictionaries, detached."""
        return self.template.dictionary

    @property
    def dead(self) -> Bool[Tensor, "members modes"]:
        """Which modes count as dead."""
        return self.template.dead

    @property
    def statistics(self) -> Float[Tensor, "members statistics"]:
        """Sums over the rows of the last batch, to be summed over ranks between ``loss`` and ``after_step``."""
        return self.template.statistics

    @statistics.setter
    def statistics(self, values: Float[Tensor, "members statistics"]) -> None:
        self.template.statistics = values

    @property
    def row_group(self) -> Group:
        """Processes over which batches are spread."""
        return self.template.row_group

    @row_group.setter
    def row_group(self, group: Group) -> None:
        self.template.row_group = group

    def before_step(self) -> None:
        """Adjust gradients after the backward pass."""
        self.template.before_step()

    def after_step(self) -> None:
        """Restore constraints and keep counts after the optimizer's step."""
        self.template.after_step()

    def resample(
        self, rows: Float[Tensor, "*members batch channels"], seeds: Sequence[int]
    ) -> Bool[Tensor, "members modes"]:
        """Reinitialise dead modes; see :meth:`TrainedAutoencoder.resample`."""
        return self.template.resample(self._for_all(rows), seeds)

    def seed_noise(self, seeds: Sequence[int]) -> None:
        """Draw each member's randomness from a stream of its own."""
        device = self.template.statistics.device
        self.template.noise = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def _for_all(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "all batch channels"]:
        return rows.expand(self.members, *rows.shape[-2:])


def empty_like(sae: TrainedAutoencoder, options: Mapping[str, Any] | None = None) -> TrainedAutoencoder:
    """An SAE of the same kind whose tensors hold nothing yet: to be given each by :func:`place`."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = type(sae)(sae.channels, **(sae.options if options is None else options))
    empty.architecture = sae.architecture
    return empty


def tensors_of(sae: TrainedAutoencoder) -> dict[str, Tensor]:
    """All parameters and buffers by name, those included that are not saved; detached."""
    own = {name for name, _ in empty_like(sae).named_buffers()}
    buffers = {name: tensor for name, tensor in sae.named_buffers() if name in own}
    return {name: tensor.detach() for name, tensor in [*sae.named_parameters(), *buffers.items()]}


def place(sae: TrainedAutoencoder, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the SAE's parameter or buffer ``name``, of whatever shape."""
    path, _, last = name.rpartition(".")
    owner = sae.get_submodule(path)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(tensor)
    else:
        owner._buffers[last] = tensor


def _settings(sae: TrainedAutoencoder) -> dict[str, Any]:
    return {"options": sae.options, "scale": sae.scale, "sign": sae.sign}


def _check(saes: Sequence[TrainedAutoencoder]) -> None:
    if not saes:
        raise SaeError("a stack needs at least one SAE")
    first = saes[0]
    if not isinstance(first, TrainedAutoencoder):
        raise SaeError(f"{first.architecture} is fitted, not trained by gradient: it cannot be stacked")
    for sae in saes[1:]:
        if type(sae) is not type(first) or sae.channels != first.channels:
            raise SaeError(
                f"SAEs in a stack must be alike: found {first.architecture} of {first.channels} channels and "
                f"{sae.architecture} of {sae.channels}"
            )
        unlike = [name for name in differing(first.options, sae.options) if name not in first.member_options]
        if unlike:
            raise SaeError(
                f"SAEs in a stack may differ in {', '.join(first.member_options)}, but these differ in "
                f"{', '.join(unlike)}: train them apart"
            )
