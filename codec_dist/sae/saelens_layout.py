"""The layout of SAELens 6.54.12 (``cfg.json``, ``sae_weights.safetensors``), read and written without it.

There W_enc is [d_in, d_sae] and W_dec [d_sae, d_in]; a = (x − b_dec) W_enc + b_enc if ``apply_b_dec_to_input``.
``standard`` is ReLU, ``topk`` keeps the ``k`` largest, ``jumprelu`` those above ``threshold``; ``gated`` has b_gate,
r_mag and b_mag in place of b_enc.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from codec_dist.sae.base import SparseAutoencoder
from codec_dist.sae.errors import SaeError
from codec_dist.sae.interop import Folded, folded, log_threshold, need, read_files, threshold_of, unfolded, write_files

VERSION = "6.54.12"
WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
THEIRS = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
}
OURS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}


def write(sae: SparseAutoencoder, path: Path) -> None:
    """Write ``sae`` into the folder ``path``."""
    weights = folded(sae, "SAELens")
    kind = THEIRS[sae.architecture]
    state = {"W_enc": weights.encoder.T, "W_dec": weights.decoder, "b_dec": weights.decoder_bias}
    config: dict[str, Any] = {"d_in": sae.channels, "d_sae": sae.modes, "architecture": kind, "device": "cpu"}
    config |= {"dtype": str(weights.decoder.dtype).removeprefix("torch."), "apply_b_dec_to_input": True}
    config |= {
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION},
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
    write_files(path, (WEIGHTS_FILE, state), (CONFIG_FILE, config))


def read(path: Path) -> SparseAutoencoder:
    """Read the SAE in the folder ``path``."""
    state, config = read_files(path, WEIGHTS_FILE, CONFIG_FILE)
    kind = _kind(config)
    if kind not in OURS:
        raise SaeError(f"the SAE in {path} is of architecture {kind!r}; known here: {', '.join(OURS)}")
    for name, wanted in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(name, wanted) not in (wanted, False, None):
            raise SaeError(f"the SAE in {path} has {name} = {config[name]!r}: fold it into the weights first")
    if config.get("rescale_acts_by_decoder_norm"):
        raise SaeError(f"the SAE in {path} has rescale_acts_by_decoder_norm: call fold_W_dec_norm on it first")
    encoder, decoder, bias = (need(state, name, path) for name in ("W_enc", "W_dec", "b_dec"))
    offset = need(state, "b_gate" if kind == "gated" else "b_enc", path)
    # Where b_dec is not taken off the input, c + b Eᵀ in place of c says the same.
    shift = 0 if config.get("apply_b_dec_to_input", True) else bias @ encoder
    options, others = _particulars(kind, config, state, shift, path)
    return unfolded(OURS[kind], Folded(encoder.T, offset + shift, decoder, bias), options, others)


def _particulars(
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


def _kind(config: dict[str, Any]) -> str:
    # Before version 6, TopK was a standard SAE with another activation.
    old = config.get("activation_fn_str", config.get("activation_fn"))
    return "topk" if old == "topk" else str(config.get("architecture", "standard"))
