"""Where models come from: torchvision, timm, and functions of the user's own."""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from codec_dist.models.errors import ModelError
from codec_dist.models.preprocessing import Preprocessing
from codec_dist.utils import suggestion


class Source(NamedTuple):
    """A model as its library builds it."""

    module: nn.Module
    """The model, on the CPU, with the library's pretrained weights where they were asked for."""
    preprocessing: Callable[[], Preprocessing]
    """What the model's metadata say about its input; raises ModelError where they say nothing."""


def build_source(spec: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    """Build the model that ``spec`` names: ``torchvision:NAME``, ``timm:NAME`` or ``module:PACKAGE.FILE:FUNCTION``.

    Raises:
        ModelError: bad spec, missing library, unknown name, or options that the model refuses.
    """
    kind, _, name = spec.partition(":")
    if kind not in SOURCES or not name:
        forms = "torchvision:NAME, timm:NAME or module:PACKAGE.FILE:FUNCTION"
        raise ModelError(f"bad model spec {spec!r}: {suggestion(kind, SOURCES)} (write {forms})")
    return SOURCES[kind](name, options, pretrained)


def _from_torchvision(name: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    models = _library("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}: {suggestion(name, models.list_models())}")
    weights = "DEFAULT" if pretrained else None
    module = _build(f"torchvision:{name}", lambda: models.get_model(name, weights=weights, **options))

    def preprocessing() -> Preprocessing:
        available = list(models.get_model_weights(name))
        transform: Any = models.get_model_weights(name).DEFAULT.transforms() if available else None
        if not hasattr(transform, "crop_size"):
            raise _unknown_preprocessing(f"torchvision:{name}")
        return Preprocessing(
            size=transform.crop_size[0],
            resize=transform.resize_size[0],
            interpolation=transform.interpolation.value,
            channels=3,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )

    return Source(module, preprocessing)


def _from_timm(name: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    timm = _library("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}: {suggestion(name, timm.list_models())}")
    module = _build(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **options))

    def preprocessing() -> Preprocessing:
        # The size of a model built for other images is among its options, not in its metadata.
        given = {option: options[option] for option in ("img_size", "in_chans") if option in options}
        config = timm.data.resolve_data_config(given, pretrained_cfg=getattr(module, "pretrained_cfg", {}))
        channels, size, width = config["input_size"]
        if size != width or config["crop_mode"] != "center" or len(config["mean"]) != channels:
            raise _unknown_preprocessing(f"timm:{name}")
        return Preprocessing(
            size=size,
            resize=math.floor(size / config["crop_pct"]),
            interpolation=config["interpolation"],
            channels=channels,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        )

    return Source(module, preprocessing)


def _from_module(name: str, options: Mapping[str, Any], pretrained: bool) -> Source:
    del pretrained  # The function decides: its weights are the only ones there are.
    spec = f"module:{name}"
    location, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in location.split(".")):
        raise ModelError(f"bad model spec {spec!r}: write module:PACKAGE.FILE:FUNCTION")
    function = getattr(_import(location, spec), attribute, None)
    if not callable(function):
        raise ModelError(f"{spec}: the module {location} has no function {attribute!r}")
    module = _build(spec, lambda: function(**options))

    def preprocessing() -> Preprocessing:
        raise _unknown_preprocessing(spec)

    return Source(module, preprocessing)


SOURCES: dict[str, Callable[[str, Mapping[str, Any], bool], Source]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "module": _from_module,
}


def _library(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside a foreign torch raises RuntimeError
        package = name.partition(".")[0]
        hint = "install the extra `vision`: pip install 'codec_dist[vision]'"
        raise ModelError(f"{spec} needs {package}, which cannot be imported ({_first_line(error)}): {hint}") from error


def _import(location: str, spec: str) -> ModuleType:
    importlib.invalidate_caches()
    top = location.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        # Installed commands do not look into the current folder by themselves.
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(location)
    except Exception as error:
        raise ModelError(f"{spec}: importing {location} failed: {_first_line(error)}") from error


def _build(spec: str, build: Callable[[], Any]) -> nn.Module:
    try:
        module = build()
    except Exception as error:
        raise ModelError(f"{spec} cannot be built: {_first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _unknown_preprocessing(spec: str) -> ModelError:
    return ModelError(
        f"{spec} does not say how its images are prepared: set model.preprocessing (size, mean, std, ...)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
