"""From the config's ``model`` section to a model that is ready to be explained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from codec_dist.config import ModelSection
from codec_dist.models.errors import ModelError
from codec_dist.models.preprocessing import Preprocessing
from codec_dist.models.sources import build_source
from codec_dist.models.weights import fingerprint, load_weights


@dataclass(frozen=True)
class LoadedModel:
    """A model and what is known about it.

    Attributes:
        module: the model on the CPU, in evaluation mode, its parameters frozen.
        preprocessing: from an image to the model's input.
        fingerprint: SHA-256 of the architecture (spec, options, names, shapes, types) and the weights.
        classes: number of outputs, None where the output is not [batch, classes].
    """

    module: nn.Module
    preprocessing: Preprocessing
    fingerprint: str
    classes: int | None


def load_model(section: ModelSection, seed: int = 0) -> LoadedModel:
    """Build a model, fill it with its weights and try it on one blank image.

    ``weights`` is ``none`` (random, a function of ``seed``), ``default`` (the library's pretrained; for
    ``module:`` specs, as the function returns the model) or a safetensors or state-dict file. The
    preprocessing is the section's own, else what the library's metadata say.

    Raises:
        ModelError: unknown model, missing library, weights that do not fit, no preprocessing, or an
            input size that the model refuses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        source = build_source(section.spec, section.options, pretrained=section.weights == "default")
    if section.weights not in ("default", "none"):
        load_weights(source.module, Path(section.weights), section.spec)
    settings = section.preprocessing
    if settings is None:
        preprocessing = source.preprocessing()
    else:
        values = settings.model_dump()
        preprocessing = Preprocessing(**{**values, "resize": settings.resize or settings.size})
    module = source.module.cpu().eval().requires_grad_(False)
    classes = _count_classes(module, preprocessing, section.spec)
    architecture = {"spec": section.spec, "options": section.options}
    return LoadedModel(module, preprocessing, fingerprint(module, architecture), classes)


def _count_classes(module: nn.Module, preprocessing: Preprocessing, spec: str) -> int | None:
    shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
    parameter = next(module.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            output = module(torch.zeros(1, *shape, dtype=parameter.dtype))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"{spec} does not take images of {list(shape)} (channels, height, width): {reason}; see model.preprocessing"
        ) from error
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None
