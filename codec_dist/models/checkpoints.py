"""Reading a file of weights without running code that it may hold; whatever else it is gets one clear line."""

import argparse
import codecs
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from codec_dist.models.errors import ModelError, printable, reason_of

# Under which training scripts keep the weights in a checkpoint, the likeliest first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
# How many wrappers may lie in each other.
DEEPEST = 4
# The first bytes of files that are often found in the place of weights.
FOREIGN = (
    (b"version https://git-lfs.github.com/spec/", "it is a git-lfs pointer, not the file: run `git lfs pull`"),
    (b"\x1f\x8b", "it is a gzip file: unpack it first"),
    (b"\x89HDF", "it is an HDF5 file (as Keras writes them)"),
    (b"\x93NUMPY", "it is a numpy array"),
    (b"%PDF", "it is a PDF document"),
)


# How torch began its files before they were zip archives.
OLD_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
DAMAGED = "it is damaged, or no file of torch: get it again"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Names and tensors in a safetensors file, or in a checkpoint saved by torch.

    The state dict may lie in a dictionary beside other things (``{"epoch": 3, "state_dict": {...}}``).

    Raises:
        ModelError: no such file, or none that holds plain tensors; what it is instead, and what to do.
    """
    require_file(path)
    with path.open("rb") as file:
        head = file.read(4096)
    if _is_safetensors(path, head):
        return _read_safetensors(path)
    if what := _what_instead(path, head):
        raise _unreadable(path, what)
    return _state_dict(_read_torch(path), path)


def require_file(path: Path) -> None:
    """Refuse a path at which there is no file.

    Raises:
        ModelError: there is nothing, or a folder.
    """
    if path.is_dir():
        raise ModelError(f"the weights {path} are a folder: give the file in it")
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}: give a file, `default` or `none`")


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors; none for other files."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        if not _is_safetensors(path, head):
            return {}
        with safe_open(path, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # reading the tensors will say so


def _is_safetensors(path: Path, head: bytes) -> bool:
    """By the first bytes, whatever the file is called: the length of the header, and the header in JSON."""
    return head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # types that torch does not have raise whatever they like
        raise _unreadable(path, f"{reason_of(error)}; get the file again") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not by its path, whose suffix torch would go by.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.findall(r"GLOBAL ([\w.]+)", printable(str(error)))
        # A dictionary may hold the state dict or the whole model, or be the state dict.
        recipe = (
            f"python -c \"import torch; c = torch.load({str(path)!r}, weights_only=False, map_location='cpu'); "
            "c = c.get('state_dict', c.get('model_state_dict', c.get('model', c))) if isinstance(c, dict) else c; "
            "torch.save(c.state_dict() if hasattr(c, 'state_dict') else c, 'weights.pth')\""
        )
        holds = f"objects of Python ({named[0]})" if named else "more than plain tensors"
        raise _unreadable(path, f"it holds {holds}; if you trust it, save its tensors alone: {recipe}") from error
    except Exception as error:  # bytes that are no pickle fail in any way
        raise _unreadable(path, f"{DAMAGED} ({type(error).__name__})") from error


def _plain_types() -> list[Any]:
    """What training scripts keep beside the weights and what holds no code: numbers of numpy, parsed arguments."""
    # The names under which numpy 1 and numpy 2 write these functions; numpy itself can make them on request.
    scalar, array = np.float64(0).__reduce__()[0], np.empty(0).__reduce__()[0]
    renamed = [
        (function, f"numpy.{core}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
        for core in ("core", "_core")
    ]
    kinds = [each for each in vars(np.dtypes).values() if isinstance(each, type) and issubclass(each, np.dtype)]
    return [*renamed, np.dtype, np.ndarray, *kinds, argparse.Namespace]


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(DEEPEST):
        if not isinstance(found, Mapping) or _is_state(found):
            break
        wrapped = [found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping) and found[name]]
        states = [value for value in found.values() if _is_state(value)]
        if not wrapped and len(states) != 1:
            break
        found = (wrapped or states)[0]
    if not isinstance(found, Mapping):
        raise ModelError(f"the weights {path} hold a {type(found).__name__}, not a state dict of names and tensors")
    others = [key for key, value in found.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if others or not found:
        named = printable(", ".join(map(str, [*others][:5]))) or "nothing"
        raise ModelError(f"the weights {path} hold a {type(found).__name__}, not a state dict alone: found {named}")
    for key, tensor in found.items():
        if tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
            kind = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse"
            raise ModelError(f"the weights {path}: {printable(key)} is {kind}: save plain dense tensors")
    return dict(found)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _what_instead(path: Path, head: bytes) -> str | None:
    """What a file is, as far as its first bytes tell, if it is certainly no file of weights."""
    if not head:
        return "it is empty"
    for magic, what in FOREIGN:
        if head.startswith(magic):
            return what
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "it is a web page, as a download that asks for a login gives: get the file itself"
    if b"/annex/objects/" in head:
        return "it is a git-annex pointer, not the file: run `git annex get`"
    if head.startswith(b"PK"):
        return _what_zip(path)
    if _is_text(head):
        return "it is text"
    return None if OLD_MAGIC in head[:32] else DAMAGED


def _what_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "it is cut short or damaged: get it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript program: save the state_dict() of the Python model instead"
    if any(name.endswith(".npy") for name in names):
        return "it is a numpy archive"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return "it is a zip file that torch did not write" + (f" ({names[0]}, ...)" if names else "")
    return None


def _is_text(head: bytes) -> bool:
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\r\n\t" for character in text)


def _unreadable(path: Path, why: str) -> ModelError:
    expected = (
        "are not a whole safetensors file"
        if path.suffix == ".safetensors"
        else "cannot be read as a plain state dict of tensors"
    )
    return ModelError(f"the weights {path} {expected}: {why}")
