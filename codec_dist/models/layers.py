"""Layer keys: which hidden tensor is meant, and how globs and presets become such keys."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from codec_dist.models.errors import ModelError
from codec_dist.models.mlps import find_mlps
from codec_dist.utils import suggestion

BLOCK_CLASS = re.compile(r"(Block|Bottleneck|InvertedResidual|EncoderLayer|MBConv)(V?\d+)?$")


@dataclass(frozen=True)
class LayerKey:
    """One hidden tensor of a model and the reduction to channels: ``name``, ``name@input``, ``name:reduction``.

    Attributes:
        module: the module's name as in ``model.named_modules()``.
        at_input: the module's input is meant, not its output.
        reduction: how positions are reduced; None is the default for the tensor's shape.
    """

    module: str
    at_input: bool = False
    reduction: str | None = None

    @classmethod
    def parse(cls, text: str) -> "LayerKey":
        """Read a key, the inverse of ``str(key)``.

        Raises:
            ModelError: the text is not of the form ``name[@input][:reduction]``.
        """
        place, colon, reduction = text.partition(":")
        module, at, side = place.partition("@")
        if not module or (at and side != "input") or (colon and not reduction):
            raise ModelError(f"bad layer key {text!r}: write NAME, NAME@input, NAME:REDUCTION or NAME@input:REDUCTION")
        return cls(module, bool(at), reduction or None)

    @property
    def site(self) -> "LayerKey":
        """The same place without the reduction: keys of one site share one hidden tensor."""
        return replace(self, reduction=None)

    def __str__(self) -> str:
        return self.module + ("@input" if self.at_input else "") + (f":{self.reduction}" if self.reduction else "")


def resolve_layers(model: nn.Module, patterns: Sequence[str]) -> tuple[LayerKey, ...]:
    """The layer keys that ``patterns`` name, in the order of the model's modules, each once.

    A pattern is a layer key whose module part is a module name, a glob (``*`` and ``?`` stay within one
    part of a dotted name, ``**`` spans several), or a preset, which goes before a module of that name:

    - ``blocks``: the outermost residual or transformer blocks. These are the items of every list or
      ``Sequential`` called ``blocks``, and modules whose class is called a block (``Bottleneck``,
      ``BasicBlock``, ``CNBlock``, ``InvertedResidual``, ``EncoderBlock``, ...).
    - ``mlp_neurons``: the input of the second linear layer of every MLP (timm's, torchvision's, torch's and others
      built alike; not of squeeze-excite modules, which gate with a pooled vector: :func:`find_mlps`).
    - ``attention_channels``: the input of the output projection ``proj`` of every attention.
    - ``attention_heads``: the same, reduced to heads.

    Raises:
        ModelError: a pattern that names no module, with the nearest names.
    """
    if not patterns:
        raise ModelError("no layers are named: name at least one module, or a preset such as `blocks`")
    positions = {name: index for index, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    keys = dict.fromkeys(key for pattern in patterns for key in _expand(model, pattern, positions))
    return tuple(sorted(keys, key=lambda key: positions[key.module]))


def _expand(model: nn.Module, pattern: str, names: Iterable[str]) -> list[LayerKey]:
    requested = LayerKey.parse(pattern)
    if requested.module in PRESETS:
        keys = [_combine(key, requested, pattern) for key in PRESETS[requested.module](model)]
        if keys:
            return keys
        if requested.module not in names:
            raise ModelError(
                f"the preset {requested.module!r} finds nothing in {type(model).__name__}: {_examples(model)}"
            )
    if any(character in requested.module for character in "*?["):
        parts = requested.module.split(".")
        matching = [name for name, _ in model.named_modules() if name and _matches(parts, name.split("."))]
    else:
        matching = [requested.module] if requested.module in names else []
    if not matching:
        known = suggestion(requested.module, [*filter(None, names), *PRESETS])
        raise ModelError(f"{type(model).__name__} has no layer {requested.module!r}: {known}")
    return [replace(requested, module=name) for name in matching]


def _combine(found: LayerKey, requested: LayerKey, pattern: str) -> LayerKey:
    if found.reduction and requested.reduction:
        raise ModelError(
            f"layer key {pattern!r}: the preset {requested.module!r} has its own reduction {found.reduction!r}"
        )
    return LayerKey(found.module, found.at_input or requested.at_input, found.reduction or requested.reduction)


def _matches(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


def _examples(model: nn.Module) -> str:
    children = [name for name, _ in model.named_modules() if name][:6]
    return "name modules instead, e.g. " + ", ".join(children) if children else "it has no submodules"


def _blocks(model: nn.Module) -> Iterator[LayerKey]:
    def walk(module: nn.Module, prefix: str) -> Iterator[LayerKey]:
        for name, child in module.named_children():
            if name == "blocks" and isinstance(child, nn.Sequential | nn.ModuleList):
                yield from items(child, f"{prefix}{name}.")
            elif BLOCK_CLASS.search(type(child).__name__):
                yield LayerKey(prefix + name)
            else:
                yield from walk(child, f"{prefix}{name}.")

    def items(container: nn.Module, prefix: str) -> Iterator[LayerKey]:
        for name, child in container.named_children():
            # Some models hold stages of blocks; a Sequential of single operations is itself a block.
            if isinstance(child, nn.Sequential) and all(len(list(item.children())) for item in child):
                yield from items(child, f"{prefix}{name}.")
            else:
                yield LayerKey(prefix + name)

    return walk(model, "")


def _mlp_neurons(model: nn.Module) -> Iterator[LayerKey]:
    return (LayerKey(name, at_input=True) for name in find_mlps(model))


def _attention_channels(model: nn.Module) -> Iterator[LayerKey]:
    for name, module in model.named_modules():
        if hasattr(module, "num_heads") and isinstance(getattr(module, "proj", None), nn.Module):
            yield LayerKey(f"{name}.proj".lstrip("."), at_input=True)


def _attention_heads(model: nn.Module) -> Iterator[LayerKey]:
    return (replace(key, reduction="heads") for key in _attention_channels(model))


PRESETS: dict[str, Callable[[nn.Module], Iterator[LayerKey]]] = {
    "blocks": _blocks,
    "mlp_neurons": _mlp_neurons,
    "attention_channels": _attention_channels,
    "attention_heads": _attention_heads,
}
