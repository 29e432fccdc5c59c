"""Where the channels of a hidden tensor are, for modules of torch whose own type says so."""

from torch import nn

from codec_dist.models.layers import LayerKey

CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
)
# Modules of torch that keep the order of what comes before.
ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
# What timm's MLPs do between their two linear layers.
WITHIN_MLP = ("act", "drop1", "norm")


def keeps_channels_last(model: nn.Module, key: LayerKey) -> bool:
    """Whether a four-dimensional output (or input) of the module is [batch, height, width, channels]."""
    return _order(model, key.module, key.at_input) == "last"


def keeps_channels_first(model: nn.Module, key: LayerKey) -> bool:
    """Whether a three-dimensional output (or input) of the module is [batch, channels, length], not tokens."""
    return _order(model, key.module, key.at_input) == "first"


def _order(model: nn.Module, name: str, at_input: bool) -> str | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    known = _known(module, at_input)
    if known is not None:
        return known
    if isinstance(module, nn.Sequential) and len(module):
        children = [child for child, _ in module.named_children()]
        return _order(model, f"{name}.{children[0 if at_input else -1]}".lstrip("."), at_input)
    before = _before(model, name) if type(module).__module__ in ELEMENTWISE or type(module) is nn.Identity else None
    return None if before is None else _order(model, before, at_input=False)


def _known(module: nn.Module, at_input: bool) -> str | None:
    if isinstance(module, CHANNELS_FIRST):
        return "first"
    # Subclasses of LayerNorm normalise channels that come first.
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        return "last"
    dimensions = getattr(module, "dims", None)
    if type(module).__name__ == "Permute" and isinstance(dimensions, list | tuple):
        to_last = list(dimensions) == [0, 2, 3, 1]
        return ("first" if at_input else "last") if to_last else ("last" if at_input else "first")
    return None


def _before(model: nn.Module, name: str) -> str | None:
    """The module whose output a module gets, where that is plain from the structure."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    siblings = [child for child, _ in parent.named_children()]
    if isinstance(parent, nn.Sequential):
        place = siblings.index(own)
        return f"{parent_name}.{siblings[place - 1]}".lstrip(".") if place else None
    if "fc1" in siblings and own in WITHIN_MLP:
        return f"{parent_name}.fc1".lstrip(".")
    return None
