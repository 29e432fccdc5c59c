"""Weights from a file put into a model, and the fingerprint of a model."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from codec_dist.models.checkpoints import read_checkpoint
from codec_dist.models.errors import ModelError, printable
from codec_dist.utils import hash_json

# What wrappers put before every name: DataParallel, torch.compile, modules of Lightning and other trainers.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
# The count of batches seen is absent from old files, and evaluation does not use it.
UNUSED = "num_batches_tracked"


def load_weights(model: nn.Module, path: Path, name: str) -> tuple[str, ...]:
    """Fill ``model`` with the weights in ``path`` (safetensors, or a state dict saved by torch).

    Prefixes of known wrappers that all names in the file share are left out where the rest are the model's names.

    Args:
        model: the model, changed in place.
        path: the file.
        name: how the model is called in error messages.

    Returns:
        What was done to make the weights fit, in a sentence each.

    Raises:
        ModelError: no such file, not a weights file, or weights that do not fit, naming the first that do not.
    """
    expected = model.state_dict()
    prefix, found = _without_prefix(read_checkpoint(path), expected)
    missing = [key for key in expected if key not in found and not key.endswith(UNUSED)]
    unexpected = [key for key in found if key not in expected]
    # Parameters of lazy modules take the shapes of the file.
    common = [(key, found[key], wanted) for key, wanted in expected.items() if key in found and not is_lazy(wanted)]
    misshaped = [
        f"{key} ({list(given.shape)} in the file, {list(wanted.shape)} in the model)"
        for key, given, wanted in common
        if given.shape != wanted.shape
    ]
    mistyped = [
        f"{key} ({_kind(given)} in the file, {_kind(wanted)} in the model)"
        for key, given, wanted in common
        if not key.endswith(UNUSED) and not _fits(given, wanted)
    ]
    problems = [
        f"{problem} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for problem, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
            ("of another type", mistyped),
        )
        if keys
    ]
    if problems:
        raise ModelError(f"the weights {path} do not fit {name}: {printable('; '.join(problems))}")
    model.load_state_dict(found, strict=False)
    return (f"the prefix {prefix!r} of all names in {path} is left out",) if prefix else ()


def fingerprint(model: nn.Module, architecture: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of what defines a model: ``architecture`` (plain JSON values), and the names,
    shapes, types and bytes of its parameters and buffers. The same on every machine.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in state.items()]
    digest = hashlib.sha256(hash_json([dict(architecture), tensors]).encode())
    for tensor in state.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_prefix(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The names without those shared prefixes with which most of them are the model's, and the prefixes."""
    candidates = [("", found)]
    prefix, state = candidates[0]
    while known := next((each for each in PREFIXES if all(name.startswith(each) for name in state)), None):
        prefix, state = prefix + known, {name.removeprefix(known): tensor for name, tensor in state.items()}
        candidates.append((prefix, state))
    return max(candidates, key=lambda candidate: len(candidate[1].keys() & expected.keys()))


def _fits(given: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of the file become those of the model by rounding alone."""
    if given.is_floating_point() or given.is_complex():
        return given.is_floating_point() == wanted.is_floating_point() and given.is_complex() == wanted.is_complex()
    return not wanted.is_floating_point() and not wanted.is_complex()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
