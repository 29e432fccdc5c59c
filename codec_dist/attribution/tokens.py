"""Which tokens of a layer are the class token, and which are of the image."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from codec_dist.attribution.axes import IMAGE, UNKNOWN, Origin, Run
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.tracing import Traced
from codec_dist.models import LayerKey

CLASS_TOKEN = re.compile(r"cls|class(?!if)")
OTHER_TOKEN = re.compile(r"reg|storage|dist|mask|prompt|quer|latent|memory")
POSITION = re.compile(r"pos")


class Places(NamedTuple):
    """Ranges (first, length) along the tokens of a layer."""

    ranges: tuple[tuple[int, int], ...]

    def of(self, values: Tensor, dimension: int) -> Tensor:
        """These tokens alone; a view where they lie together."""
        parts = [values.narrow(dimension, first, length) for first, length in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dimension)


def find_tokens(model: nn.Module, key: LayerKey, traced: Traced | None, count: int) -> Places:
    """Where the tokens that a key names (``class_token`` or ``patch_tokens``) are among the ``count`` of its layer.

    Decided by what the forward pass joins to the image's tokens, from which parameters; where it does not tell, by
    the model's parameters and the number of patches that its patch embedding states. Of a distilled model's two
    prefix tokens the first is the class token; the other is neither class token nor patch.

    Raises:
        AttributionError: the layer has no such token, or it cannot be told.
    """
    runs = () if traced is None else traced.tokens
    if sum(run.length for run in runs) != count or any(run.origin == UNKNOWN for run in runs):
        runs = _counted(model, count)
    if not runs:
        raise AttributionError(
            f"layer {key}: which of its {count} tokens are class token, registers and patches cannot be told from the "
            f"forward pass: use {key.module}:tokens, which takes all of them"
        )
    roles = [_role(model, run, () if traced is None else traced.read_out) for run in runs]
    wanted = "class" if key.reduction == "class_token" else "patch"
    found = [number for number, role in enumerate(roles) if role == wanted]
    if wanted == "class" and (len(found) > 1 or (not found and "unclear" in roles)):
        raise AttributionError(
            f"layer {key}: which of its tokens is the class token cannot be told ({_described(runs)}): use "
            f"{key.module}:tokens or {key.module}:patch_tokens"
        )
    if not found:
        name, other = ("class token", "patch_tokens") if wanted == "class" else ("patch tokens", "class_token")
        raise AttributionError(
            f"layer {key}: {type(model).__name__} has no {name} here ({_described(runs)}): use tokens or {other}"
        )
    starts = [sum(run.length for run in runs[:number]) for number in found]
    lengths = [1 if wanted == "class" else runs[number].length for number in found]
    return Places(tuple(zip(starts, lengths, strict=True)))


def _role(model: nn.Module, run: Run, read_out: Collection[Origin]) -> str:
    if isinstance(run.origin, str):
        return "patch"
    names = {name.rpartition(".")[2].lower() for name in run.origin}
    names = {name for name in names if not POSITION.search(name)} or names
    is_class, is_other = (any(word.search(name) for name in names) for word in (CLASS_TOKEN, OTHER_TOKEN))
    if is_class and is_other:
        return "unclear"
    if is_class:
        distilled = any(hasattr(module, "head_dist") for module in model.modules())
        return "class" if run.length == 1 or distilled else "unclear"
    # A token whose name says nothing is the class token if the network reads it, alone, out of all tokens.
    if names and not is_other:
        return "class" if run.length == 1 and run.origin in read_out else "unclear"
    return "other"


def _counted(model: nn.Module, count: int) -> tuple[Run, ...]:
    """Runs by the parameters called tokens and the stated number of patches, if that gives ``count`` tokens."""
    learned = [
        (name, parameter.shape[-2] if parameter.ndim > 1 else 1)
        for name, parameter in model.named_parameters()
        if "token" in name.rpartition(".")[2] and not re.search(r"mask|pos", name.rpartition(".")[2])
    ]
    learned.sort(key=lambda item: not CLASS_TOKEN.search(item[0].rpartition(".")[2]))
    numbers = [getattr(module, "num_patches", None) for module in model.modules()]
    stated = {number for number in numbers if isinstance(number, int)}
    prefix = sum(length for _, length in learned)
    declared = {module.num_prefix_tokens for module in model.modules() if hasattr(module, "num_prefix_tokens")}
    if len(stated) != 1 or stated.pop() + prefix != count or declared - {prefix}:
        return ()
    return (*(Run(length, frozenset([name])) for name, length in learned), Run(count - prefix, IMAGE))


def _described(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        names = [] if isinstance(run.origin, str) else sorted(run.origin)
        parts.append(
            f"{run.length} of {'the image' if isinstance(run.origin, str) else ' and '.join(names) or 'zeros'}"
        )
    return "its tokens: " + ", ".join(parts)
