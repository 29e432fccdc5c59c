"""SAEs in the file layouts of SAELens and overcomplete, where the formulas are the same. Needs neither of them.

In SAELens, W_enc is [d_in, d_sae] and W_dec [d_sae, d_in]; a = (x − b_dec) W_enc + b_enc if ``apply_b_dec_to_input``.
``standard`` is ReLU, ``topk`` keeps the ``k`` largest, ``jumprelu`` those above ``threshold``; ``gated`` has b_gate,
r_mag and b_mag instead of b_enc.

The SAEs of overcomplete with the ``linear`` encoder are a = x Wᵀ + c with W = ``encoder.final_block.0.weight``
[nb_concepts, input] and c = ``encoder.final_block.0.bias``; x̂ = z D with D = exp(``dictionary.multiplier``) ·
normalization (``dictionary._weights``), and no decoder bias. ``SAE`` is ReLU, ``TopKSAE`` keeps the ``top_k``
largest, ``JumpSAE`` those that reach exp(``thresholds``). That library saves whole modules by pickle; here the state
and the constructor's arguments are kept apart::

    config = json.loads(Path(folder, "config.json").read_text())
    model = getattr(overcomplete.sae, config["class"])(**config["arguments"])
    model.load_state_dict(safetensors.torch.load_file(Path(folder, "state_dict.safetensors")))
    model.train().eval()    # eval fuses the dictionary
"""

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

SAELENS_VERSION = "6.54.12"
SAELENS_WEIGHTS, SAELENS_CONFIG = "sae_weights.safetensors", "cfg.json"
TO_SAELENS = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
}
FROM_SAELENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}

OVERCOMPLETE_VERSION = "0.3.0"
OVERCOMPLETE_WEIGHTS, OVERCOMPLETE_CONFIG = "state_dict.safetensors", "config.json"
OVERCOMPLETE_WEIGHT, OVERCOMPLETE_BIAS = "encoder.final_block.0.weight", "encoder.final_block.0.bias"
TO_OVERCOMPLETE = {
    "relu": "SAE",
    "topk": "TopKSAE",
    "jumprelu": "JumpSAE",
    "batchtopk": "JumpSAE",
    "matryoshka": "JumpSAE",
}
FROM_OVERCOMPLETE = {"SAE": "relu", "TopKSAE": "topk", "JumpSAE": "jumprelu"}
L2_GUARD = 1e-8


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
    known = {"saelens": (write_saelens, read_saelens), "overcomplete": (write_overcomplete, read_overcomplete)}
    if layout not in known:
        raise SaeError(f"unknown layout {layout!r}: choose {' or '.join(known)}")
    return known[layout]


# ---- The layout of SAELens 6.54.12 (``cfg.json``, ``sae_weights.safetensors``), read and written without it


def write_saelens(sae: SparseAutoencoder, path: Path) -> None:
    """Write ``sae`` into the folder ``path``."""
    weights = folded(sae, "SAELens")
    kind = TO_SAELENS[sae.architecture]
    state = {"W_enc": weights.encoder.T, "W_dec": weights.decoder, "b_dec": weights.decoder_bias}
    config: dict[str, Any] = {"d_in": sae.channels, "d_sae": sae.modes, "architecture": kind, "device": "cpu"}
    config |= {"dtype": str(weights.decoder.dtype).removeprefix("torch."), "apply_b_dec_to_input": True}
    config |= {
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION},
    }
    if kind == "gated":
        named = dict(sae.named_parameters())
        state |= {"b_gate": weights.encoder_bias, "r_mag": named["log_gain"], "b_mag": named["magnitude_bias"]}
    else:
        state["b_enc"] = weights.encoder_bias
    if kind == "jumprelu":
        state["threshold"] = threshold_of(sae)
    if kind == "topk":
        config |= {"k": sae.options["k"], "rescale_acts_by_decoder_norm": False}
    write_files(path, (SAELENS_WEIGHTS, state), (SAELENS_CONFIG, config))


def read_saelens(path: Path) -> SparseAutoencoder:
    """Read the SAE in the folder ``path``."""
    state, config = read_files(path, SAELENS_WEIGHTS, SAELENS_CONFIG)
    kind = _saelens_kind(config)
    if kind not in FROM_SAELENS:
        raise SaeError(f"the SAE in {path} is of architecture {kind!r}; known here: {', '.join(FROM_SAELENS)}")
    for name, wanted in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(name, wanted) not in (wanted, False, None):
            raise SaeError(f"the SAE in {path} has {name} = {config[name]!r}: fold it into the weights first")
    if config.get("rescale_acts_by_decoder_norm"):
        raise SaeError(f"the SAE in {path} has rescale_acts_by_decoder_norm: call fold_W_dec_norm on it first")
    encoder, decoder, bias = (need(state, name, path) for name in ("W_enc", "W_dec", "b_dec"))
    offset = need(state, "b_gate" if kind == "gated" else "b_enc", path)
    # Where b_dec is not taken off the input, c + b Eᵀ instead of c says the same.
    shift = 0 if config.get("apply_b_dec_to_input", True) else bias @ encoder
    options, others = _saelens_particulars(kind, config, state, shift, path)
    return unfolded(FROM_SAELENS[kind], Folded(encoder.T, offset + shift, decoder, bias), options, others)


def _saelens_particulars(
    kind: str, config: dict[str, Any], state: dict[str, Tensor], shift: Tensor | int, path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and further parameters of one architecture."""
    if kind == "topk":
        return {"k": int(need({**config.get("activation_fn_kwargs", {}), **config}, "k", path))}, {}
    if kind == "jumprelu":
        return {}, {"log_threshold": log_threshold(need(state, "threshold", path))}
    if kind == "gated":
        gain, magnitude = need(state, "r_mag", path), need(state, "b_mag", path)
        return {}, {"log_gain": gain, "magnitude_bias": magnitude + gain.exp() * shift}
    return {}, {}


def _saelens_kind(config: dict[str, Any]) -> str:
    # Before version 6, TopK was a standard SAE with another activation.
    old = config.get("activation_fn_str", config.get("activation_fn"))
    return "topk" if old == "topk" else str(config.get("architecture", "standard"))


# ---- The state names of overcomplete 0.3.0 (Fel et al.), read and written without it


def write_overcomplete(sae: SparseAutoencoder, path: Path) -> None:
    """Write ``sae`` into the folder ``path``."""
    weights = folded(sae, "overcomplete")
    if sae.architecture not in TO_OVERCOMPLETE:
        raise SaeError(f"overcomplete has no SAE like {sae.architecture!r}: it cannot be exported")
    if weights.decoder_bias.any():
        raise SaeError("overcomplete's SAEs have no decoder bias: train one with the option decoder_bias = none")
    kind = TO_OVERCOMPLETE[sae.architecture]
    state = {OVERCOMPLETE_WEIGHT: weights.encoder, OVERCOMPLETE_BIAS: weights.encoder_bias}
    state |= {"dictionary._weights": weights.decoder, "dictionary.multiplier": weights.decoder.new_zeros(())}
    arguments: dict[str, Any] = {"input_shape": sae.channels, "nb_concepts": sae.modes}
    arguments["dictionary_params"] = {"normalization": "identity"}
    if kind == "TopKSAE":
        arguments["top_k"] = sae.options["k"]
    if kind == "JumpSAE":
        state["thresholds"] = log_threshold(threshold_of(sae))
    config = {"library": "overcomplete", "version": OVERCOMPLETE_VERSION, "class": kind, "arguments": arguments}
    write_files(path, (OVERCOMPLETE_WEIGHTS, state), (OVERCOMPLETE_CONFIG, config))


def read_overcomplete(path: Path) -> SparseAutoencoder:
    """Read the SAE in the folder ``path``."""
    state, config = read_files(path, OVERCOMPLETE_WEIGHTS, OVERCOMPLETE_CONFIG)
    kind, arguments = need(config, "class", path), need(config, "arguments", path)
    if kind not in FROM_OVERCOMPLETE:
        raise SaeError(f"the SAE in {path} is a {kind!r}; known here: {', '.join(FROM_OVERCOMPLETE)}")
    unknown = [
        name for name in state if name.startswith("encoder.") and name not in (OVERCOMPLETE_WEIGHT, OVERCOMPLETE_BIAS)
    ]
    if unknown:
        raise SaeError(f"the SAE in {path} has an encoder that is not linear: {', '.join(unknown)}")
    decoder = _overcomplete_dictionary(state, arguments.get("dictionary_params") or {}, path)
    weights = Folded(
        need(state, OVERCOMPLETE_WEIGHT, path),
        need(state, OVERCOMPLETE_BIAS, path),
        decoder,
        decoder.new_zeros(decoder.shape[1]),
    )
    options = {"k": int(need(arguments, "top_k", path))} if kind == "TopKSAE" else {}
    others = {"log_threshold": need(state, "thresholds", path)} if kind == "JumpSAE" else {}
    return unfolded(FROM_OVERCOMPLETE[kind], weights, options, others)


def _overcomplete_dictionary(state: dict[str, Tensor], parameters: dict[str, Any], path: Path) -> Tensor:
    rows = need(state, "dictionary._weights", path)
    normalization = parameters.get("normalization", "l2")
    if normalization == "l2":
        rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + L2_GUARD)
    elif normalization != "identity":
        raise SaeError(f"the SAE in {path} normalizes its dictionary by {normalization!r}; known here: l2, identity")
    return rows * state.get("dictionary.multiplier", torch.zeros(())).exp()
