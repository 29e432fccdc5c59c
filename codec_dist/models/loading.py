"""From the config's ``model`` section to a model that is ready to be explained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from codec_dist.config import ModelSection
from codec_dist.models.checkpoints import require_file
from codec_dist.models.errors import ModelError, reason_of
from codec_dist.models.preprocessing import Preprocessing
from codec_dist.models.settings import beside_weights, example_line, from_settings, to_settings
from codec_dist.models.sources import Source, build_source
from codec_dist.models.weights import fingerprint, load_weights

QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known about it.

    Attributes:
        module: the model on the CPU, in evaluation mode, its parameters frozen.
        preprocessing: from an image to the model's input.
        fingerprint: SHA-256 of the architecture (spec, options, names, shapes, types) and the weights.
        classes: number of outputs, None where the output is not [batch, classes].
        section: the section with what followed from the weights: it gives the same model without them being recognised.
        notes: what a person should know of the choices that were made, a sentence each.
    """

    module: nn.Module
    preprocessing: Preprocessing
    fingerprint: str
    classes: int | None
    section: ModelSection
    notes: tuple[str, ...] = ()


def load_model(section: ModelSection, seed: int = 0) -> LoadedModel:
    """Build a model, fill it with its weights and try it on one blank image.

    ``weights`` is ``none`` (random, a function of ``seed``), ``default`` (the library's pretrained; for
    ``module:`` specs, as the function returns the model), the name of a weight set of torchvision's, or a safetensors
    or state-dict file. The preprocessing is the section's own, else what stands beside the weights, else what the
    library's metadata of these weights say: a file that is none of the published ones has none.

    Raises:
        ModelError: unknown model, missing library, weights that do not fit, no preprocessing, or an
            input size that the model refuses.
    """
    file = Path(section.weights) if section.weights_kind == "file" else None
    if file is not None:
        require_file(file)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        source = build_source(section)
    _refuse_what_cannot_be_explained(source.module, section.spec)
    notes = load_weights(source.module, file, section.spec) if file else ()
    preprocessing, origin = _find_preprocessing(section, source, file)
    module = _without_inference_tensors(source.module).cpu().eval()
    classes = _try_on_blank(module, preprocessing, section.spec)
    module.requires_grad_(False)
    architecture = {"spec": section.spec, "options": dict(source.options)}
    resolved = section.model_copy(update={"options": dict(source.options)})
    if section.preprocessing is None:
        resolved = resolved.model_copy(update={"preprocessing": to_settings(preprocessing, origin)})
    said = f"preprocessing: {preprocessing} (from {origin})"
    return LoadedModel(module, preprocessing, fingerprint(module, architecture), classes, resolved, (*notes, said))


def _find_preprocessing(section: ModelSection, source: Source, file: Path | None) -> tuple[Preprocessing, str]:
    """How images are prepared, and who says so."""
    if section.preprocessing is not None:
        given = from_settings(section.preprocessing)
        if section.preprocessing.source is not None:
            return given, f"the config (from {section.preprocessing.source})"
        known = source.metadata() if section.weights_kind != "none" else None
        if known is None or known.preprocessing in (None, given):
            return given, "the config"
        return given, f"the config (unlike {known.source}: {known.preprocessing})"
    if file is not None and (beside := beside_weights(file)):
        return beside
    known = source.metadata()
    if known.preprocessing is None:
        what = f"{section.spec} with the weights {file}" if file else section.spec
        raise ModelError(f"{what} does not say how its images are prepared: {example_line(file)}")
    random = " (of weights that are not loaded)" if section.weights_kind == "none" else ""
    return known.preprocessing, known.source + random


def _refuse_what_cannot_be_explained(module: nn.Module, spec: str) -> None:
    """Models whose layers cannot be watched, or that have no gradients."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(f"{spec} gives a TorchScript module, whose layers cannot be watched: give the Python model")
    for name, part in module.named_modules():
        own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
        place = type(part).__module__
        if any(tensor.is_quantized for tensor in own if not is_lazy(tensor)) or place.startswith(QUANTISED):
            raise ModelError(
                f"{spec} is quantised ({name or 'the model'} is a {type(part).__name__}), and quantised operations "
                "have no gradients: give the model in floating point"
            )


def _without_inference_tensors(module: nn.Module) -> nn.Module:
    """Parameters and buffers made in inference mode cannot take part in a graph: copies take their places."""
    copies: dict[int, Any] = {}
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if not is_lazy(tensor) and tensor.is_inference():
                if id(tensor) not in copies:
                    copy = tensor.clone()
                    copies[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
                setattr(part, name, copies[id(tensor)])
    return module


def _try_on_blank(module: nn.Module, preprocessing: Preprocessing, spec: str) -> int | None:
    """The number of outputs; a model that changes its input in place gets a copy from then on."""
    tensors: Iterator[Tensor] = (tensor for tensor in (*module.parameters(), *module.buffers()))
    floating = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    blank = torch.zeros(1, *preprocessing.shape, dtype=floating)
    try:
        with torch.inference_mode(False), torch.no_grad():
            output = module(blank)
    except Exception as error:
        raise ModelError(
            f"{spec} does not take images of {list(preprocessing.shape)} (channels, height, width): the model raised "
            f"{type(error).__name__} while it was given a blank one: {reason_of(error)}; see model.preprocessing"
        ) from error
    if blank._version:
        module.register_forward_pre_hook(_copy_images)
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def _copy_images(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = inputs
    return (images.clone(), *others)
