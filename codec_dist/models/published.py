"""Which published set of weights a file is, by the hash in its name or by its content."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from codec_dist.models.errors import ModelError
from codec_dist.models.preprocessing import Preprocessing

Key = TypeVar("Key")

# torch.hub puts the first digits of a file's SHA-256 at the end of its name.
HASH = re.compile(r"[-_]([0-9a-f]{8,64})(\.[A-Za-z]+)*$")


class Metadata(NamedTuple):
    """How images are prepared for a set of weights, and who says so."""

    preprocessing: Preprocessing | None
    """None where nothing says it."""
    source: str
    """Where the values come from, in words for people."""


Describe = Callable[[], Metadata]


def recognise(path: Path, published: Mapping[Key, str]) -> tuple[Key, str] | None:
    """The published set that a file is, and by what it was recognised.

    A file is recognised by the published hash at the end of its name, however that begins, or by its content.

    Args:
        path: the file.
        published: the URL of each set.
    """
    hashes = {name: found[1] for name, url in published.items() if (found := HASH.search(url))}
    in_name = HASH.search(path.name)
    for name, digits in hashes.items():
        if in_name and in_name[1] == digits:
            return name, f"its file name ({digits})"
    if hashes and path.is_file():
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        for name, digits in hashes.items():
            if content.startswith(digits):
                return name, f"its content ({digits})"
    return None


def from_torchvision(transform: Any) -> Preprocessing | None:
    """What a weight set's ``transforms()`` does, None where it is not torchvision's ``ImageClassification``."""
    if type(transform).__name__ != "ImageClassification":
        return None
    return Preprocessing(
        size=transform.crop_size[0],
        resize=transform.resize_size[0],
        interpolation=transform.interpolation.value,
        channels=3,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def from_timm(config: Mapping[str, Any]) -> Preprocessing | None:
    """What ``timm.data.create_transform`` does in evaluation with a resolved data config.

    Returns None where the config fits no grey or RGB image.
    """
    channels, height, width = config["input_size"]
    if len(config["mean"]) != channels or len(config["std"]) != channels or channels not in (1, 3):
        return None
    rows, columns = (math.floor(length / config["crop_pct"]) for length in (height, width))
    return Preprocessing(
        size=height if height == width else (height, width),
        resize=rows if rows == columns else (rows, columns),
        interpolation=config["interpolation"],
        channels=channels,
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        crop=config["crop_mode"] or "center",
    )


def choose(named: str, sets: Mapping[str, Key], spec: str) -> Key:
    """The weight set that a config names, with or without the name of its group.

    Raises:
        ModelError: the model has no such set; those that it has are named.
    """
    group, _, short = named.rpartition(".")
    found = sets.get(short)
    if found is None or group not in ("", type(found).__name__):
        known = ", ".join(sets) or "none"
        raise ModelError(
            f"{spec} has no weight set {named!r}: it has {known}; a file without a suffix is given as ./{named}"
        )
    return found
