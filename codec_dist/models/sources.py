"""Where models come from: torchvision, timm, and functions of the user's own."""

import functools
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import JsonValue
from torch import nn

from codec_dist.config import ModelSection
from codec_dist.models.errors import ModelError, reason_of
from codec_dist.models.preprocessing import Preprocessing
from codec_dist.models.published import Describe, Metadata, choose, from_timm, from_torchvision, recognise
from codec_dist.models.settings import parse_preprocessing
from codec_dist.utils import suggestion

CONFIG = "config.json"


class Source(NamedTuple):
    """A model as its library builds it."""

    module: nn.Module
    """The model, on the CPU, with the library's weights where they were requested; those of a file are not in it."""
    metadata: Describe
    """What the metadata of the weights say about the model's input."""
    options: Mapping[str, JsonValue]
    """The options with which the model is built, those included that follow from the weights."""


def build_source(section: ModelSection) -> Source:
    """Build the model of a config: ``torchvision:NAME``, ``timm:NAME`` or ``module:PACKAGE.FILE:FUNCTION``.

    Raises:
        ModelError: bad spec, missing library, unknown name or weight set, or options that the model refuses.
    """
    kind, _, name = section.spec.partition(":")
    if kind not in SOURCES or not name:
        forms = "torchvision:NAME, timm:NAME or module:PACKAGE.FILE:FUNCTION"
        raise ModelError(f"bad model spec {section.spec!r}: {suggestion(kind, SOURCES)} (write {forms})")
    if section.weights_kind == "set" and kind != "torchvision":
        raise ModelError(
            f"model.weights {section.weights!r} names a weight set, which torchvision's models alone have: for "
            f"{section.spec} give `default`, `none` or a file (timm's sets are named in the spec, as timm:MODEL.SET)"
        )
    return SOURCES[kind](name, section)


def _from_torchvision(name: str, section: ModelSection) -> Source:
    models = _library("torchvision.models", section.spec)
    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}: {suggestion(name, models.list_models())}")
    sets: Mapping[str, Any] = models.get_model_weights(name).__members__
    weights: Any = None
    options = dict(section.options)
    if section.weights_kind == "default":
        weights = "DEFAULT"
    elif section.weights_kind == "set":
        weights = choose(section.weights, sets, section.spec)
    module = _build(section.spec, lambda: models.get_model(name, weights=weights, **options))

    @functools.cache
    def recognised() -> tuple[Any, str] | None:
        return recognise(Path(section.weights), {each: each.url for each in sets.values()})

    converts = hasattr(module, "transform_input") and "transform_input" not in options
    if section.weights_kind == "file" and converts:
        # Torchvision's builder sets it with the weights, which it does not get here.
        if recognised() is None:
            raise _unknown_conversion(section)
        options["transform_input"] = module.transform_input = True  # type: ignore[assignment]

    def metadata() -> Metadata:
        if section.weights_kind == "file":
            if (found := recognised()) is None:
                return Metadata(None, "")
            return Metadata(from_torchvision(found[0].transforms()), f"{found[0]}, recognised by {found[1]}")
        if not sets:
            return Metadata(None, "")
        selected = weights if section.weights_kind == "set" else sets["DEFAULT"]
        return Metadata(from_torchvision(selected.transforms()), str(selected))

    return Source(module, metadata, options)


def _unknown_conversion(section: ModelSection) -> ModelError:
    return ModelError(
        f"{section.spec} with the weights {section.weights}: set model.options.transform_input to true if they were "
        "fine-tuned from torchvision's (whose network converts its input so), to false if trained from scratch; the "
        "file does not say it"
    )


def _from_timm(name: str, section: ModelSection) -> Source:
    timm = _library("timm", section.spec)
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}: {suggestion(name, timm.list_models())}")
    options, pretrained = section.options, section.weights_kind == "default"
    module = _build(section.spec, lambda: timm.create_model(name, pretrained=pretrained, **options))

    def metadata() -> Metadata:
        config: Mapping[str, Any] = getattr(module, "pretrained_cfg", {})
        source = f"timm's metadata of {name.partition('.')[0]}.{config.get('tag') or 'default'}"
        if section.weights_kind == "file":
            architecture, path = name.partition(".")[0], Path(section.weights)
            if own := _config_beside(architecture, path):
                config, source = own, str(path.with_name(CONFIG))
            elif found := _published_by_timm(timm, architecture, path):
                config = timm.get_pretrained_cfg(found[0]).to_dict()
                source = f"timm's metadata of {found[0]}, recognised by {found[1]}"
            else:
                return Metadata(None, "")
        return Metadata(from_timm(resolve_timm(config, options)), source)

    return Source(module, metadata, options)


def resolve_timm(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Timm's data config for a model that was built with ``options``, which its metadata do not know of."""
    data = importlib.import_module("timm.data")
    resolved: dict[str, Any] = data.resolve_data_config({}, pretrained_cfg=dict(config))
    channels, *size = resolved["input_size"]
    if given := options.get("img_size"):
        size = [given, given] if isinstance(given, int) else given
    return resolved | {"input_size": (options.get("in_chans", channels), *size)}


def _config_beside(architecture: str, path: Path) -> Mapping[str, Any] | None:
    """The metadata in the ``config.json`` that timm's own saving puts beside weights of an architecture."""
    try:
        values = json.loads(path.with_name(CONFIG).read_bytes())
    except (OSError, ValueError):
        return None
    own = values.get("pretrained_cfg") if isinstance(values, dict) else None
    return own if isinstance(own, dict) and values.get("architecture") == architecture else None


def _published_by_timm(timm: Any, architecture: str, path: Path) -> tuple[str, str] | None:
    """The weights of timm, as MODEL.SET, that a file is, and by what it was recognised."""
    names = timm.list_pretrained(f"{architecture}.*")
    # The folders of the Hugging Face cache bear the names of what is in them.
    for part in path.parts:
        repository = part.removeprefix("models--timm--")
        if part != repository and repository in names:
            return repository, f"its folder ({part})"
    urls = {name: timm.get_pretrained_cfg(name).url or "" for name in names}
    return recognise(path, {name: url for name, url in urls.items() if url})


def _from_module(name: str, section: ModelSection) -> Source:
    # Whether it is pretrained is the function's to decide: its weights are the only ones there are.
    spec, options = section.spec, section.options
    location, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in location.split(".")):
        raise ModelError(f"bad model spec {spec!r}: write module:PACKAGE.FILE:FUNCTION")
    function = getattr(_import(location, spec), attribute, None)
    if not callable(function):
        raise ModelError(f"{spec}: the module {location} has no function {attribute!r}")
    module = _build(spec, lambda: function(**options))

    def metadata() -> Metadata:
        own = getattr(module, "preprocessing", None)
        source = f"the attribute `preprocessing` of {type(module).__name__}"
        if isinstance(own, Preprocessing):
            return Metadata(own, source)
        return Metadata(parse_preprocessing(own, source) if isinstance(own, Mapping) else None, source)

    return Source(module, metadata, options)


SOURCES: dict[str, Callable[[str, ModelSection], Source]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "module": _from_module,
}


def _library(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # torchvision beside a torch that it was not built for raises RuntimeError
        package = name.partition(".")[0]
        hint = "install the extra `vision`: pip install 'codec_dist[vision]'"
        raise ModelError(f"{spec} needs {package}, which cannot be imported ({reason_of(error)}): {hint}") from error


def _import(location: str, spec: str) -> ModuleType:
    importlib.invalidate_caches()
    top = location.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        # Installed commands do not look into the current folder by themselves.
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(location)
    except Exception as error:
        raise ModelError(f"{spec}: importing {location} failed: {reason_of(error)}") from error


def _build(spec: str, build: Callable[[], Any]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # Of libraries about their own future, in the middle of a user's terminal.
            warnings.simplefilter("ignore", FutureWarning)
            module = build()
    except Exception as error:
        raise ModelError(f"{spec} cannot be built: {reason_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec} gives a {type(module).__name__}, not a torch.nn.Module")
    return module
