"""SAEs in the file layouts of other libraries, where the formulas are the same. Needs none of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from codec_dist.sae.base import SparseAutoencoder, build
from codec_dist.sae.batchtopk import BatchTopKAutoencoder
from codec_dist.sae.errors import SaeError
from codec_dist.sae.jumprelu import JumpReluAutoencoder
from codec_dist.sae.linear import LinearAutoencoder
from codec_dist.utils import read_json, write_bytes_atomically, write_json_atomically

SMALLEST_THRESHOLD = 1e-30


class Folded(NamedTuple):
    """A linear encoder and dictionary in stored units, all scaling folded in: a = (x − b) Eᵀ + c, x̂ = z D + b."""

    encoder: Float[Tensor, "modes channels"]
    encoder_bias: Float[Tensor, "modes"]
    decoder: Float[Tensor, "modes channels"]
    decoder_bias: Float[Tensor, "channels"]


def export_sae(sae: SparseAutoencoder, path: Path, layout: str) -> None:
    """Write an SAE into the folder ``path`` as another library would.

    ``saelens``: ``cfg.json`` and ``sae_weights.safetensors``, which ``sae_lens.SAE.load_from_disk`` reads.
    ``overcomplete``: ``state_dict.safetensors``, and ``config.json`` with the class and its arguments. Scaling
    is folded into the weights; loadings stay the same. BatchTopK and Matryoshka become JumpReLU with their
    one threshold, as they are used.

    Raises:
        SaeError: the other library has no such formulation, or there is no such layout.
    """
    writer, _ = _layout(layout)
    writer(sae, Path(path))


def import_sae(path: Path, layout: str) -> SparseAutoencoder:
    """Read an SAE from a folder written by ``export_sae`` or, for ``saelens``, by that library; in eval mode.

    Raises:
        SaeError: files missing or damaged, or a formulation that no architecture here has.
    """
    _, reader = _layout(layout)
    return reader(Path(path)).eval()


def folded(sae: SparseAutoencoder, library: str) -> Folded:
    """The weights of an SAE with a linear encoder, in stored units.

    Raises:
        SaeError: another kind of SAE.
    """
    if not isinstance(sae, LinearAutoencoder):
        raise SaeError(f"{library} has no SAE like {sae.architecture!r}: it cannot be exported")
    state = {name: tensor.detach() for name, tensor in sae.named_parameters()}
    divisor = torch.full((sae.channels,), float(sae.scale)).to(sae.decoder)
    divisor = divisor if sae.channel_scale is None else divisor * sae.channel_scale
    bias = state.get("decoder_bias", torch.zeros_like(divisor))
    return Folded(state["encoder"] / divisor, state["encoder_bias"], state["decoder"] * divisor, bias * divisor)


def unfolded(
    architecture: str, weights: Folded, options: Mapping[str, Any], others: Mapping[str, Tensor]
) -> SparseAutoencoder:
    """An SAE here from weights in stored units; ``others`` are its remaining parameters by name."""
    modes, channels = weights.decoder.shape
    fixed = {"modes": modes, "scaling": "none", "normalize": False, "decoder_bias": "zero"}
    sae = build(architecture, {**fixed, **options}, channels).to(weights.decoder.dtype)
    state = sae.state_dict() | weights._asdict() | dict(others)
    try:
        sae.load_state_dict(state)
    except RuntimeError as error:
        raise SaeError(f"the weights do not fit each other: {' '.join(str(error).split())}") from error
    return sae


def threshold_of(sae: SparseAutoencoder) -> Float[Tensor, "modes"]:
    """The threshold of each mode of a JumpReLU, BatchTopK or Matryoshka SAE in eval mode."""
    assert isinstance(sae, JumpReluAutoencoder | BatchTopKAutoencoder)
    return sae.threshold.detach().expand(sae.modes)


def log_threshold(threshold: Float[Tensor, "modes"]) -> Float[Tensor, "modes"]:
    """Logarithms of thresholds; 0 (a plain ReLU) becomes as good as 0."""
    return threshold.clamp(min=SMALLEST_THRESHOLD).log()


def write_files(path: Path, weights: tuple[str, Mapping[str, Tensor]], config: tuple[str, Mapping[str, Any]]) -> None:
    """Write tensors and a config, each (file name, content)."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights[1].items()}
    write_bytes_atomically(path / weights[0], safetensors.torch.save(tensors))
    write_json_atomically(path / config[0], dict(config[1]))


def read_files(path: Path, weights: str, config: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and a config.

    Raises:
        SaeError: a file is missing or damaged.
    """
    try:
        found, tensors = read_json(path / config), safetensors.torch.load_file(path / weights)
    except FileNotFoundError as error:
        raise SaeError(f"{path} must hold {config} and {weights}: {error}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise SaeError(f"{config} or {weights} in {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SaeError(f"{path / config} must hold an object, found {type(found).__name__}")
    return tensors, found


def need(values: Mapping[str, Any], name: str, path: Path) -> Any:
    """``values[name]``, or an SaeError that says what is missing where."""
    if name not in values:
        raise SaeError(f"the SAE in {path} has no {name!r}; it has {', '.join(sorted(values))}")
    return values[name]


def _layout(layout: str) -> tuple[Callable[[SparseAutoencoder, Path], None], Callable[[Path], SparseAutoencoder]]:
    # Here, because both use what this module defines.
    from codec_dist.sae import overcomplete_layout, saelens_layout

    known = {"saelens": saelens_layout, "overcomplete": overcomplete_layout}
    if layout not in known:
        raise SaeError(f"unknown layout {layout!r}: choose {' or '.join(known)}")
    return known[layout].write, known[layout].read
