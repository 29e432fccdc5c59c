"""What every sparse autoencoder is, whatever its architecture, and the options that an architecture takes."""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.sae.arithmetic import ALONE, Group, channel_scales, wide
from codec_dist.sae.checkpoint import read_checkpoint, write_checkpoint
from codec_dist.sae.errors import SaeError
from codec_dist.sae.metrics import ReconstructionMetrics, ReconstructionReport
from codec_dist.utils import Registry

Sign = Literal["positive", "negative", "net", "both"]

Scaling = Literal["scalar", "per_channel", "none"]
DERIVED = ("expansion", "hidden_per_channel")


class Loss(NamedTuple):
    """A training loss and what it is made of."""

    total: Float[Tensor, "*members"]
    """What is minimized: a mean over the rows of the batch, plus terms that do not depend on rows."""
    parts: dict[str, Tensor]
    """The terms by name, unweighted and detached, for logging."""

    @classmethod
    def weighted(cls, terms: Mapping[str, tuple[float | Tensor, Tensor]]) -> "Loss":
        """The sum of terms, each given as (weight, value); the first has the weight 1."""
        (_, total), *others = terms.values()
        for weight, value in others:
            total = total + weight * value
        return cls(total, {name: value.detach() for name, (_, value) in terms.items()})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every architecture can be asked for."""

    modes: int | None = None
    """Rows of the dictionary."""
    scaling: Scaling = "scalar"
    """What rows are divided by: one standard deviation over everything (the paper), one per channel, or nothing."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, kind):
                raise ValueError(f"{name} must be {_describe(kind)}, found {value!r}")
        if self.modes is not None and self.modes < 1:
            raise ValueError(f"modes must be at least 1, found {self.modes}")

    def resolve(self, channels: int) -> "Options":
        """These options with every default that depends on the number of channels filled in.

        Raises:
            ValueError: values that contradict each other or the number of channels.
        """
        return self if self.modes is not None else replace(self, modes=channels)

    def plain(self) -> dict[str, Any]:
        """JSON values from which the same SAE is built again."""
        values = {name: value for name, value in asdict(self).items() if name not in DERIVED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Sequence:
        return isinstance(value, tuple | list) and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    # True is an int to Python, but not to a person.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(part) for part in parts))
    if origin is Sequence:
        return f"a list of {_describe(parts[0])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}
    return words.get(kind, kind.__name__)


class SparseAutoencoder(nn.Module):
    """Rows [batch, channels] as sparse combinations of the rows of a dictionary [modes, channels].

    ``encode`` takes rows in the units in which they are stored and ``decode`` returns such rows. Inside, rows
    are divided by ``scale``, one number for the whole layer, or by one number per channel (``scaling``).
    Loadings are ≥ 0, except those of PCA.

    An architecture is a subclass that sets ``architecture`` and ``option_type``, implements ``encode_scaled``,
    ``decode_scaled``, ``loss`` and ``atoms``, and enters itself into ``ARCHITECTURES``. Its formulas are
    written for tensors with any leading dimensions, so that parameters with a leading dimension of members
    make a stack of SAEs (:class:`StackedAutoencoder`), and sum over modes through ``mode_group``, so that
    each process may hold a part of the dictionary (:func:`shard`).

    ``loss`` must be a mean over rows (plus terms without rows), so that the losses of two halves of a batch
    average to the loss of the whole: training on several processes relies on it. Where it is more than a
    mean over rows (BatchTopK), what couples rows goes through ``row_group``.
    """

    architecture: str
    """Name in ``ARCHITECTURES``; the import path, where :func:`build` found the class by one."""
    option_type: ClassVar[type[Options]] = Options
    """The options of the architecture; keyword arguments of its constructor."""
    mode_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters of which each mode owns a row: what resampling reinitialises, and what sharding divides."""
    member_options: ClassVar[tuple[str, ...]] = ()
    """Options (attributes) in which the members of a stack may differ."""
    options: dict[str, Any]
    """JSON values that, with ``channels``, build this SAE again."""
    channel_scale: Float[Tensor, "*members channels"] | None
    """Divisors of the channels, after that by ``scale``; None where all are 1."""
    statistics: Float[Tensor, "*members statistics"]
    """Sums over the rows of the last batch given to ``loss`` which ``after_step`` uses. When a batch is spread
    over ranks, the trainer sums them over the ranks in between."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        # So that the registry, and help, know what a config may ask for.
        cls.__signature__ = signature(cls.option_type)  # type: ignore[attr-defined]

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, found {channels}")
        self.settings = self.option_type(**options).resolve(channels)
        assert self.settings.modes is not None
        self.channels, self.modes = channels, self.settings.modes
        self.options = self.settings.plain()
        self.scale = 1.0  # of a stack whose members differ: a tensor, see take_members
        self.sign: Sign | None = None
        self.noise: torch.Generator | list[torch.Generator] | None = None
        self.row_group: Group = ALONE
        self.mode_group: Group = ALONE
        self.first_mode = 0
        self.register_buffer("statistics", torch.zeros(0), persistent=False)
        per_channel = self.settings.scaling == "per_channel" or self._flips
        self.register_buffer("channel_scale", torch.ones(channels) if per_channel else None)

    # ---- what everyone uses

    def encode(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        """Loadings of rows in stored units."""
        return self.encode_scaled(self.scaled(rows))

    def decode(self, loadings: Float[Tensor, "*members batch modes"]) -> Float[Tensor, "*members batch channels"]:
        """Rows in stored units from loadings."""
        return self._stored(self.decode_scaled(loadings)) * wide(self.scale)

    def forward(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch channels"]:
        """The reconstruction of rows, both in stored units."""
        return self.decode(self.encode(rows))

    @property
    def dictionary(self) -> Float[Tensor, "*members modes channels"]:
        """The modes as vectors over channels, detached: times ``scale``, what a loading of 1 adds to a row."""
        return self._stored(self.atoms()).detach()

    @torch.no_grad()
    def metrics(self, batches: Iterable[Tensor]) -> ReconstructionReport:
        """How well held-out rows ([batch, channels], in stored units) are reconstructed, in eval mode."""
        training, found = self.training, ReconstructionMetrics()
        self.eval()
        try:
            for rows in batches:
                loadings = self.encode(rows)
                found.update(rows, self.decode(loadings), loadings)
        finally:
            self.train(training)
        return found.result(self.dictionary.cpu())

    # ---- what an architecture defines

    def encode_scaled(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch modes"]:
        """Loadings of rows that are already scaled."""
        raise NotImplementedError

    def decode_scaled(
        self, loadings: Float[Tensor, "*members batch modes"]
    ) -> Float[Tensor, "*members batch channels"]:
        """Scaled rows from loadings."""
        raise NotImplementedError

    def atoms(self) -> Float[Tensor, "*members modes channels"]:
        """The dictionary in units of scaled rows, differentiable."""
        raise NotImplementedError

    def loss(self, rows: Float[Tensor, "*members batch channels"], batch_rows: int | None = None) -> Loss:
        """The training loss of rows in stored units; records ``statistics``.

        Args:
            rows: this process's share of a batch, which may be none of it.
            batch_rows: rows of the batch over all processes of ``row_group``; default: those given.
        """
        raise NotImplementedError

    # ---- what a trainer uses

    @torch.no_grad()
    def calibrate(
        self,
        rows: Float[Tensor, "rows channels"],
        scale: int | float,
        deviations: Float[Tensor, "channels"] | None = None,
    ) -> None:
        """Set the scaling and whatever starts from data.

        Args:
            rows: some rows (in stored units) of the fit part.
            scale: standard deviation over all elements of the fit part.
            deviations: standard deviation of each channel, for ``scaling`` per channel; default: that of ``rows``.

        Raises:
            SaeError: the scale is not a positive number.
        """
        if not 0 < scale < float("inf"):
            raise SaeError(f"rows with a standard deviation of {scale:g} cannot be decomposed: they must vary")
        self.scale = float(scale) if self.settings.scaling == "scalar" else 1.0
        if self.channel_scale is not None:
            spread = rows.double().std(0, correction=0) if deviations is None else deviations
            per_channel = self.settings.scaling == "per_channel"
            divisors = channel_scales(rows, spread, float(scale), per_channel=per_channel, flip=self._flips)
            self.channel_scale.copy_(divisors)
        self._start_from(self.scaled(rows))

    def before_step(self) -> None:
        """Adjust gradients after the backward pass, before the optimizer's step."""

    def after_step(self) -> None:
        """Restore constraints and keep counts after the optimizer's step."""

    def seed_noise(self, seed: int) -> None:
        """Draw the randomness of the following losses (dropout) from a stream of its own."""
        self.noise = torch.Generator(device=self.statistics.device).manual_seed(seed)

    @property
    def layer_channels(self) -> int:
        """Channels of the layer: half of ``channels`` where a row holds the positive and the negative part."""
        return self.channels // 2 if self.sign == "both" else self.channels

    # ---- files

    def save(self, directory: Path, details: Mapping[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, each atomically.

        ``details`` (JSON values, e.g. which rows the SAE was fitted on) are kept in ``config.json``.
        """
        config = {"architecture": self.architecture, "channels": self.channels, "modes": self.modes}
        config |= {"scale": self.scale, "sign": self.sign, "options": self.options, "details": dict(details or {})}
        write_checkpoint(Path(directory), config, self.state_dict())

    @classmethod
    def load(cls, directory: Path) -> "SparseAutoencoder":
        """Read an SAE written by ``save``, of whichever architecture, in eval mode on the CPU.

        No pickles are read. An architecture of your own, given by its import path, is imported.

        Raises:
            SaeError: files missing, damaged, of an unknown architecture, or not a ``cls``.
        """
        config, state = read_checkpoint(Path(directory))
        sae = build(config["architecture"], config["options"], config["channels"])
        if not isinstance(sae, cls):
            raise SaeError(f"{directory} holds an SAE of architecture {sae.architecture!r}, not a {cls.__name__}")
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            sae.to(dtypes.pop())
        try:
            sae.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise SaeError(f"the weights in {directory} do not fit its config.json: {reason}") from error
        sae.scale, sae.sign = float(config["scale"]), config.get("sign")
        return sae.eval()

    # ---- inside

    def scaled(self, rows: Float[Tensor, "*members batch channels"]) -> Float[Tensor, "*members batch channels"]:
        """Rows in stored units divided by ``scale`` and, where there is one, by the scale of each channel."""
        rows = rows / wide(self.scale)
        return rows if self.channel_scale is None else rows / self.channel_scale.unsqueeze(-2)

    def _stored(
        self, vectors: Float[Tensor, "*members vectors channels"]
    ) -> Float[Tensor, "*members vectors channels"]:
        return vectors if self.channel_scale is None else vectors * self.channel_scale.unsqueeze(-2)

    @property
    def _flips(self) -> bool:
        """Whether channels whose rows are all ≤ 0 are to be made ≥ 0."""
        return False

    def _start_from(self, scaled_rows: Float[Tensor, "rows channels"]) -> None:
        """Hook of ``calibrate`` for parameters that start from data."""


def _import_architecture(found: Any, name: str) -> Callable[..., SparseAutoencoder]:
    """The factory for what an import path names: an architecture's class."""
    if isinstance(found, type) and issubclass(found, SparseAutoencoder):
        return found
    raise SaeError(f"SAE architecture {name!r} is no subclass of SparseAutoencoder")


ARCHITECTURES: Registry[SparseAutoencoder] = Registry("SAE architecture", SaeError, imported=_import_architecture)
"""Architectures by name; an import path ``package.module:Class`` names one of your own."""


def build(name: str, options: Mapping[str, Any], channels: int, seed: int = 0) -> SparseAutoencoder:
    """Build the architecture ``name``, or the one at an import path, with weights that depend on ``seed`` alone.

    Raises:
        SaeError: unknown architecture or option, or a value that the architecture refuses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = ARCHITECTURES.build(name, options, channels=channels)
    # An import path is kept, so that whoever loads the SAE finds its class.
    sae.architecture = name
    return sae


# ---- Options of architectures: frozen dataclasses that check the types of what a config gives them


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(Options):
    """What every architecture that is trained by gradient can be asked for."""

    expansion: int | float = 3
    """Modes per channel (the paper's N), where `modes` is not given."""
    nonnegative: bool = False
    """Let no mode take away from a channel: dictionary rows ≥ 0, after channels whose rows are all ≤ 0 were flipped."""
    dead_window: int = 10_000
    """A mode that has not fired for so many training samples counts as dead."""
    auxk: int | None = 0
    """Dead modes per row that help to explain the residual (AuxK); 0: none."""
    auxk_coefficient: int | float = 1 / 32
    """Weight of that auxiliary loss."""
    resample_every: int | None = None
    """Re-initialise dead modes to badly reconstructed rows every so many training samples; default: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expansion <= 0 or self.dead_window < 1:
            raise ValueError("expansion must be above 0 and dead_window at least 1")
        if self.resample_every is not None and self.resample_every < 1:
            raise ValueError(f"resample_every must be at least 1, found {self.resample_every}")
        if self.auxk_coefficient < 0 or (self.auxk or 0) < 0:
            raise ValueError("auxk and auxk_coefficient must not be negative")

    def resolve(self, channels: int) -> "TrainedOptions":
        modes = self.modes if self.modes is not None else max(1, round(self.expansion * channels))
        auxk = max(1, channels // 2) if self.auxk is None else self.auxk
        return replace(self, modes=modes, auxk=min(auxk, modes))


def signature(options: type[Options]) -> Signature:
    """The signature of a constructor that takes channels and these options by name."""
    hints = get_type_hints(options)
    first = Parameter("channels", Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
    fields = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[name])
        for name, field in options.__dataclass_fields__.items()
    ]
    return Signature([first, *fields])


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names under which two sets of options disagree."""
    return sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
