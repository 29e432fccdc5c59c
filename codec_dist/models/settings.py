"""Preprocessing as settings: of the config, beside a file of weights, or of a model's own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from codec_dist.config import PreprocessingSettings
from codec_dist.models.checkpoints import safetensors_metadata
from codec_dist.models.errors import ModelError
from codec_dist.models.preprocessing import Preprocessing

SIDECAR = ".preprocessing.json"
EXAMPLE = "{size: 64, resize: 72, interpolation: bilinear, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}"


def from_settings(settings: PreprocessingSettings) -> Preprocessing:
    """The preprocessing that settings describe.

    Raises:
        ModelError: they contradict each other.
    """
    values = settings.model_dump(exclude={"source"})
    return Preprocessing(**{**values, "resize": settings.resize or settings.size})


def to_settings(preprocessing: Preprocessing, source: str) -> PreprocessingSettings:
    """The settings that give a preprocessing again, with a note of their source."""
    return PreprocessingSettings(**preprocessing.as_dict(), source=source)


def parse_preprocessing(values: Any, place: str) -> Preprocessing:
    """The preprocessing in plain values, which have the keys of ``model.preprocessing``.

    Raises:
        ModelError: an unknown key or a value out of range; ``place`` names where they stand.
    """
    try:
        return from_settings(PreprocessingSettings.model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise ModelError(f"{place}: {key}: {first['msg']}; its keys are those of model.preprocessing") from error


def beside_weights(path: Path) -> tuple[Preprocessing, str] | None:
    """What stands beside a file of weights about its images, and where.

    That is FILE.preprocessing.json, or the text ``preprocessing`` in the metadata of a safetensors file, both with
    the keys of ``model.preprocessing``.

    Raises:
        ModelError: something stands there that cannot be used.
    """
    sidecar = path.with_name(path.name + SIDECAR)
    if sidecar.is_file():
        return parse_preprocessing(_json(sidecar.read_bytes(), str(sidecar)), str(sidecar)), str(sidecar)
    if text := safetensors_metadata(path).get("preprocessing"):
        place = f"`preprocessing` in the metadata of {path}"
        return parse_preprocessing(_json(text, place), place), place
    return None


def example_line(path: Path | None) -> str:
    """What to write where nothing says how images are prepared."""
    beside = f", or as JSON into {path.name}{SIDECAR} beside the weights" if path else ""
    return f"set model.preprocessing to what the network was trained with, such as {EXAMPLE}{beside}"


def _json(text: str | bytes, place: str) -> Mapping[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{place} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{place} holds a {type(values).__name__}: expected an object with a size, a mean and a std")
    return values
