"""Weights from a file, without unpickling code, and the fingerprint of a model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from codec_dist.models.errors import ModelError
from codec_dist.utils import hash_json

WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Fill ``model`` with the weights in ``path`` (safetensors, or a state dict saved by torch).

    Args:
        model: the model, changed in place.
        path: the file.
        name: how the model is called in error messages.

    Raises:
        ModelError: no such file, not a weights file, or weights that do not fit, naming the first that do not.
    """
    found = _read(path)
    expected = model.state_dict()
    # The count of batches seen is absent from old files, and evaluation does not use it.
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    misshaped = [
        f"{key} ({list(found[key].shape)} in the file, {list(tensor.shape)} in the model)"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    faults = [
        f"{fault} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for fault, keys in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if keys
    ]
    if faults:
        raise ModelError(f"the weights {path} do not fit {name}: {'; '.join(faults)}")
    model.load_state_dict(found, strict=False)


def fingerprint(model: nn.Module, architecture: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of what defines a model: ``architecture`` (plain JSON values), and the names,

    shapes, types and bytes of its parameters and buffers. The same on every machine.
    """
    state = model.state_dict()
    tensors = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in state.items()]
    digest = hashlib.sha256(hash_json([dict(architecture), tensors]).encode())
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}: give a file, `default` or `none`")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ModelError(f"the weights {path} are not a whole safetensors file: {error}") from error
    except Exception as error:  # bytes that are no pickle fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the weights {path} cannot be read as a plain state dict of tensors: {reason}") from error
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"the weights {path} hold a {type(found).__name__}, not a state dict of names and tensors")
    return dict(found)
