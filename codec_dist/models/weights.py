"""Weights from a file put into a model, and the fingerprint of a model."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codec_dist.models.checkpoints import read_checkpoint
from codec_dist.models.errors import ModelError
from codec_dist.utils import hash_json

# What wrappers put before every name: DataParallel, Lightning and others, torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
# The count of batches seen is absent from old files, and evaluation does not use it.
UNUSED = "num_batches_tracked"


def load_weights(model: nn.Module, path: Path, name: str) -> tuple[str, ...]:
    """Fill ``model`` with the weights in ``path`` (safetensors, or a state dict saved by torch).

    A prefix that all names in the file share is left out where the rest fits the model.

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
    common = [(key, found[key], expected[key]) for key in expected if key in found]
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
    faults = [
        f"{fault} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for fault, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshaped", misshaped),
            ("of another type", mistyped),
        )
        if keys
    ]
    if faults:
        raise ModelError(f"the weights {path} do not fit {name}: {'; '.join(faults)}")
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
    """The names without the shared prefix that makes them fit, and the prefix.

    Where none makes all of them fit, prefixes of known wrappers go if more names fit without them.
    """
    candidates = [("", found), *_stripped(found)]
    for prefix, state in candidates:
        if state.keys() <= expected.keys():
            return prefix, state
    known = [(prefix, state) for prefix, state in candidates if _is_known(prefix)]
    return max(known, key=lambda candidate: len(candidate[1].keys() & expected.keys()))


def _stripped(state: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state without the first part of its names, without the first two, ... while all names share them."""
    prefix = ""
    while state:
        first = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(first) and len(name) > len(first) for name in state):
            return
        prefix, state = prefix + first, {name.removeprefix(first): tensor for name, tensor in state.items()}
        yield prefix, state


def _is_known(prefix: str) -> bool:
    while known := next((each for each in PREFIXES if prefix.startswith(each)), None):
        prefix = prefix.removeprefix(known)
    return not prefix


def _fits(given: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of the file become those of the model by rounding alone."""
    if given.is_floating_point() or given.is_complex():
        return given.is_floating_point() == wanted.is_floating_point() and given.is_complex() == wanted.is_complex()
    return not wanted.is_floating_point() and not wanted.is_complex()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
