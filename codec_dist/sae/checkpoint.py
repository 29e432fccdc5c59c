"""An SAE on disk: ``config.json`` (how to build it) and ``model.safetensors`` (its weights)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codec_dist.sae.errors import SaeError
from codec_dist.utils import read_json, write_bytes_atomically, write_json_atomically

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FIELDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "channels": int,
    "modes": int,
    "scale": (int, float),
    "options": dict,
}


def write_checkpoint(directory: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all; the config last, so that it vouches for the weights."""
    # Cloned, because parameters may be views into one buffer, which safetensors refuses.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    write_bytes_atomically(directory / WEIGHTS_FILE, safetensors.torch.save(tensors))
    write_json_atomically(directory / CONFIG_FILE, {"format": FORMAT, **config})


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights; no code is unpickled.

    Raises:
        SaeError: a file is missing, damaged or of another format.
    """
    config = _read_config(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    try:
        return config, safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise SaeError(f"{directory} holds no {WEIGHTS_FILE}: the SAE was not saved completely") from error
    except (OSError, SafetensorError) as error:
        raise SaeError(f"{path} cannot be read as safetensors ({error}): train the SAE again") from error


def has_weights(directory: Path) -> bool:
    """Whether the weights are there and as long as their header says; no numbers are read."""
    try:
        with safe_open(directory / WEIGHTS_FILE, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise SaeError(f"no SAE in {path.parent}: it has no {path.name}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaeError(f"{path} cannot be read as JSON ({error}): train the SAE again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise SaeError(f"{path} does not describe an SAE of format {FORMAT} (found {found!r})")
    for field, kind in FIELDS.items():
        if not isinstance(config.get(field), kind) or isinstance(config[field], bool):
            raise SaeError(f"{path}: the field {field!r} is missing or of the wrong type: {config.get(field)!r}")
    return config
