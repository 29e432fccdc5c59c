"""All that the numbers of a store depend on, spelled out so that equal settings are equal."""

import importlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codec_dist.attribution import (
    BASELINES,
    METHODS,
    POINTS,
    TARGETS,
    Attributor,
    GivenPoints,
    IntegratedGradients,
    UniformPoints,
)
from codec_dist.config import Choice, Config
from codec_dist.extraction.errors import ExtractionError
from codec_dist.models import LoadedModel
from codec_dist.shards import ShardIndex, split_seed
from codec_dist.utils import Registry, hash_file


def store_identity(config: Config, index: ShardIndex, loaded: LoadedModel, attributor: Attributor) -> dict[str, Any]:
    """All that the stored numbers depend on (docs/formats.md §4.1)."""
    section = config.attribution
    return {
        "data": {
            "fingerprint": index.fingerprint,
            "image_fields": list(config.data.image_fields),
            "label_field": config.data.label_field,
        },
        "model": {"spec": config.model.spec, "fingerprint": loaded.fingerprint},
        "preprocessing": dict(loaded.preprocessing.as_dict()),
        "layers": list(attributor.layers),
        "attribution": {
            "method": _spelled_out(METHODS, section.method),
            "target": _spelled_out(TARGETS, section.target),
            "further_targets": [_spelled_out(TARGETS, choice) for choice in section.further_targets],
            "activations": section.activations,
            "gradients": section.gradients,
            "microbatch": section.microbatch,
            "deterministic": section.deterministic,
            "autocast": section.autocast,
            "fold_batchnorm": section.fold_batchnorm,
            "channels_last": section.channels_last,
            "allow_random": section.allow_random,
            "allow_mixing": section.allow_mixing,
            **({"statistics": statistics_definition(config)} if needs_statistics(config) else {}),
        },
        "dtype": section.dtype,
        "threads_per_actor": config.cluster.cpus_per_actor,
    }


def needs_statistics(config: Config) -> bool:
    """Whether a target or a baseline must first be measured over the data set."""
    section = config.attribution
    method = METHODS.build(section.method.name, section.method.options)
    choices = (section.target, *section.further_targets)
    return method.needs_statistics or any(
        TARGETS.build(choice.name, choice.options).needs_statistics for choice in choices
    )


def statistics_definition(config: Config) -> dict[str, Any]:
    """What statistics of the data set depend on, beside the data and the model."""
    return {"part": "fit", "split": config.data.split.model_dump(), "seed": split_seed(config)}


def _spelled_out(registry: Registry[Any], choice: Choice) -> dict[str, Any]:
    """A choice with the defaults of its options, so that leaving one out and giving its default are the same.

    What is named by import path brings a hash of its module's source, so that changed code is another choice.
    """
    parameters = inspect.signature(registry.factory(choice.name)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    options = defaults | choice.options
    if choice.name == "integrated_gradients":
        options["baseline"] = _spelled_out(BASELINES, _as_choice(options["baseline"]))
        given: dict[str, Any] = dict(choice.options)
        method = IntegratedGradients(**given)
        options["points"] = _spelled_out_points(method, options["points"])
        options["steps"] = method.steps
        if method.steps != "auto":
            del options["tolerance"]
        options["adaptive"] = None if method.adaptive is None else asdict(method.adaptive)
        if method.adaptive is not None and math.isinf(method.adaptive.tolerance):
            raise ExtractionError(
                "attribution.method.options.adaptive: an infinite tolerance refines nothing: leave it out"
            )
    spelled = {"name": choice.name, "options": _with_contents(options)}
    return spelled if ":" not in choice.name else {**spelled, "code": _code(choice.name)}


def _spelled_out_points(method: IntegratedGradients, value: Any) -> Any:
    """The points that the method takes of what a config says: one step, for example, has none to learn."""
    if isinstance(method.points, GivenPoints):
        return list(method.points.values)
    return _spelled_out(POINTS, _as_choice("uniform" if isinstance(method.points, UniformPoints) else value))


def _as_choice(value: Any) -> Choice:
    return Choice(name=value) if isinstance(value, str) else Choice.model_validate(value)


def _code(name: str) -> str | None:
    """Hash of the source of the module that an import path names; None where it has no file."""
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return hash_file(Path(file)) if file and Path(file).is_file() else None


def _with_contents(value: Any) -> Any:
    """Files replaced by what is in them: a file that moved is the same, one that changed is another."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: hash_file(Path(each)) if name == "file" and isinstance(each, str) else _with_contents(each)
        for name, each in value.items()
    }
