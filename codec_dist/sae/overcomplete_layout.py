"""The state names of overcomplete 0.3.0 (Fel et al.), read and written without it.

Its SAEs with the ``linear`` encoder are a = x Wᵀ + c with W = ``encoder.final_block.0.weight`` [nb_concepts, input]
and c = ``encoder.final_block.0.bias``; x̂ = z D with D = exp(``dictionary.multiplier``) · normalization
(``dictionary._weights``), and no decoder bias. ``SAE`` is ReLU, ``TopKSAE`` keeps the ``top_k`` largest, ``JumpSAE``
those that reach exp(``thresholds``). It saves whole modules by pickle; here the state and the constructor's arguments
are kept apart::

    config = json.loads(Path(folder, "config.json").read_text())
    model = getattr(overcomplete.sae, config["class"])(**config["arguments"])
    model.load_state_dict(safetensors.torch.load_file(Path(folder, "state_dict.safetensors")))
    model.train().eval()    # eval fuses the dictionary
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec_dist.sae.base import SparseAutoencoder
from codec_dist.sae.errors import SaeError
from codec_dist.sae.interop import Folded, folded, log_threshold, need, read_files, threshold_of, unfolded, write_files

VERSION = "0.3.0"
WEIGHTS_FILE, CONFIG_FILE = "state_dict.safetensors", "config.json"
WEIGHT, BIAS = "encoder.final_block.0.weight", "encoder.final_block.0.bias"
THEIRS = {"relu": "SAE", "topk": "TopKSAE", "jumprelu": "JumpSAE", "batchtopk": "JumpSAE", "matryoshka": "JumpSAE"}
OURS = {"SAE": "relu", "TopKSAE": "topk", "JumpSAE": "jumprelu"}
L2_GUARD = 1e-8


def write(sae: SparseAutoencoder, path: Path) -> None:
    """Write ``sae`` into the folder ``path``."""
    weights = folded(sae, "overcomplete")
    if sae.architecture not in THEIRS:
        raise SaeError(f"overcomplete has no SAE like {sae.architecture!r}: it cannot be exported")
    if weights.decoder_bias.any():
        raise SaeError("overcomplete's SAEs have no decoder bias: train one with the option decoder_bias = none")
    kind = THEIRS[sae.architecture]
    state = {WEIGHT: weights.encoder, BIAS: weights.encoder_bias}
    state |= {"dictionary._weights": weights.decoder, "dictionary.multiplier": weights.decoder.new_zeros(())}
    arguments: dict[str, Any] = {"input_shape": sae.channels, "nb_concepts": sae.modes}
    arguments["dictionary_params"] = {"normalization": "identity"}
    if kind == "TopKSAE":
        arguments["top_k"] = sae.options["k"]
    if kind == "JumpSAE":
        state["thresholds"] = log_threshold(threshold_of(sae))
    config = {"library": "overcomplete", "version": VERSION, "class": kind, "arguments": arguments}
    write_files(path, (WEIGHTS_FILE, state), (CONFIG_FILE, config))


def read(path: Path) -> SparseAutoencoder:
    """Read the SAE in the folder ``path``."""
    state, config = read_files(path, WEIGHTS_FILE, CONFIG_FILE)
    kind, arguments = need(config, "class", path), need(config, "arguments", path)
    if kind not in OURS:
        raise SaeError(f"the SAE in {path} is a {kind!r}; known here: {', '.join(OURS)}")
    unknown = [name for name in state if name.startswith("encoder.") and name not in (WEIGHT, BIAS)]
    if unknown:
        raise SaeError(f"the SAE in {path} has an encoder that is not linear: {', '.join(unknown)}")
    decoder = _dictionary(state, arguments.get("dictionary_params") or {}, path)
    weights = Folded(need(state, WEIGHT, path), need(state, BIAS, path), decoder, decoder.new_zeros(decoder.shape[1]))
    options = {"k": int(need(arguments, "top_k", path))} if kind == "TopKSAE" else {}
    others = {"log_threshold": need(state, "thresholds", path)} if kind == "JumpSAE" else {}
    return unfolded(OURS[kind], weights, options, others)


def _dictionary(state: dict[str, Tensor], parameters: dict[str, Any], path: Path) -> Tensor:
    rows = need(state, "dictionary._weights", path)
    normalization = parameters.get("normalization", "l2")
    if normalization == "l2":
        rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + L2_GUARD)
    elif normalization != "identity":
        raise SaeError(f"the SAE in {path} normalizes its dictionary by {normalization!r}; known here: l2, identity")
    return rows * state.get("dictionary.multiplier", torch.zeros(())).exp()
