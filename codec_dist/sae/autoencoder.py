"""What every sparse autoencoder is, whatever its architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.sae.checkpoint import read_checkpoint, write_checkpoint
from codec_dist.sae.errors import SaeError
from codec_dist.utils import Registry


class Loss(NamedTuple):
    """A training loss and what it is made of."""

    total: Float[Tensor, ""]
    """What is minimized: a mean over the rows of the batch, plus terms that do not depend on rows."""
    parts: dict[str, Float[Tensor, ""]]
    """The terms by name, detached, for logging."""


class SparseAutoencoder(nn.Module):
    """Rows [batch, channels] as sparse nonnegative combinations of the rows of a dictionary [modes, channels].

    ``encode`` takes rows in the units in which they are stored and ``decode`` returns such rows. Inside,
    rows are divided by ``scale``, one number for the whole layer (the standard deviation of everything in
    the rows that the SAE was fitted on; METHOD §3), so loadings and dictionary are in units of ``scale``.

    An architecture is a subclass that sets ``architecture`` and ``options``, implements
    ``encode_scaled``, ``decode_scaled``, ``loss`` and ``dictionary``, and enters itself into
    ``ARCHITECTURES``. ``loss`` must be a mean over rows (plus terms without rows), so that the losses of
    two halves of a batch average to the loss of the whole: training on several ranks relies on it.
    """

    architecture: ClassVar[str]
    """Name in ``ARCHITECTURES``."""
    options: dict[str, Any]
    """Keyword arguments that, with ``channels``, build this SAE again."""
    statistics: Float[Tensor, "statistics"]
    """Sums over the rows of the last batch given to ``loss`` which ``after_step`` uses (empty where it needs
    none). When a batch is spread over ranks, the trainer sums them over the ranks in between."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        if channels < 1 or modes < 1:
            raise ValueError(f"channels and modes must be at least 1, found {channels} and {modes}")
        self.channels, self.modes = channels, modes
        self.scale = 1.0
        self.noise: torch.Generator | None = None
        self.register_buffer("statistics", torch.zeros(0), persistent=False)

    def encode(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        """Loadings (≥ 0, in units of ``scale``) of rows in stored units."""
        return self.encode_scaled(rows / self.scale)

    def decode(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        """Rows in stored units from loadings."""
        return self.decode_scaled(loadings) * self.scale

    def forward(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        """The reconstruction of rows, both in stored units."""
        return self.decode(self.encode(rows))

    def encode_scaled(self, rows: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch modes"]:
        """Loadings of rows that are already divided by ``scale``."""
        raise NotImplementedError

    def decode_scaled(self, loadings: Float[Tensor, "batch modes"]) -> Float[Tensor, "batch channels"]:
        """Rows divided by ``scale`` from loadings."""
        raise NotImplementedError

    def loss(self, rows: Float[Tensor, "batch channels"]) -> Loss:
        """The training loss of rows in stored units (at least one); records ``statistics``."""
        raise NotImplementedError

    @property
    def dictionary(self) -> Float[Tensor, "modes channels"]:
        """The modes as vectors over channels, in units of ``scale``; detached."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, rows: Float[Tensor, "rows channels"], scale: int | float) -> None:
        """Set ``scale`` and whatever starts from data, given some rows (in stored units) of the fit part.

        Raises:
            SaeError: the scale is not a positive number.
        """
        if not 0 < scale < float("inf"):
            raise SaeError(f"rows with a standard deviation of {scale:g} cannot be decomposed: they must vary")
        self.scale = float(scale)
        self._start_from(rows / self.scale)

    def before_step(self) -> None:
        """Adjust gradients after the backward pass, before the optimizer's step."""

    def after_step(self) -> None:
        """Restore constraints and keep counts after the optimizer's step."""

    def seed_noise(self, seed: int) -> None:
        """Draw the randomness of the following losses (dropout) from a stream of its own."""
        self.noise = torch.Generator(device=self.statistics.device).manual_seed(seed)

    def save(self, directory: Path, details: Mapping[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors``, each atomically.

        ``details`` (JSON values, e.g. which rows the SAE was fitted on) are kept in ``config.json``.
        """
        config = {"architecture": self.architecture, "channels": self.channels, "modes": self.modes}
        config |= {"scale": self.scale, "options": self.options, "details": dict(details or {})}
        write_checkpoint(Path(directory), config, self.state_dict())

    @classmethod
    def load(cls, directory: Path) -> "SparseAutoencoder":
        """Read an SAE written by ``save``, of whichever registered architecture, in eval mode on the CPU.

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
        sae.scale = float(config["scale"])
        return sae.eval()

    def _start_from(self, scaled_rows: Float[Tensor, "rows channels"]) -> None:
        """Hook of ``calibrate`` for parameters that start from data."""


ARCHITECTURES: Registry[SparseAutoencoder] = Registry("SAE architecture", SaeError)


def build(name: str, options: Mapping[str, Any], channels: int, seed: int = 0) -> SparseAutoencoder:
    """Build the architecture ``name`` with initial weights that depend on ``seed`` alone.

    Raises:
        SaeError: unknown architecture or option, or a value that the architecture refuses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES.build(name, options, channels=channels)


def count_modes(channels: int, modes: int | None, expansion: int | float) -> int:
    """The number of modes: as given, or ``expansion`` times the channels.

    Raises:
        ValueError: ``modes`` is not a whole number.
    """
    check_whole(modes=modes)
    return modes if modes is not None else max(1, round(expansion * channels))


def check_whole(**options: int | None) -> None:
    """Refuse options (which come from a config) that should be whole numbers and are not; None passes.

    Raises:
        ValueError: such an option.
    """
    for name, value in options.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, found {value!r}")
