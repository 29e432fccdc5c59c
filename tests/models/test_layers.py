"""Layer keys read and write alike, and patterns find the layers that they promise."""

import re

import pytest
import timm
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from codec_dist.models import LayerKey, ModelError, resolve_layers

NAMES = st.from_regex(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,4}", fullmatch=True)


@given(NAMES, st.booleans(), st.none() | st.from_regex(r"[a-z_]+", fullmatch=True))
def test_a_key_survives_being_written_and_read(module: str, at_input: bool, reduction: str | None) -> None:
    key = LayerKey(module, at_input, reduction)
    assert LayerKey.parse(str(key)) == key


@pytest.mark.parametrize("text", ["", ":mean", "@input", "conv@output", "conv:", "conv@", "conv@input:"])
def test_a_malformed_key_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="bad layer key"):
        LayerKey.parse(text)


def names(model: nn.Module, *patterns: str) -> list[str]:
    return [str(key) for key in resolve_layers(model, patterns)]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18(weights=None)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, pretrained=False)


def test_blocks_of_a_torchvision_resnet_are_its_residual_blocks(resnet: nn.Module) -> None:
    assert names(resnet, "blocks") == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]


def test_resnet50_has_sixteen_blocks() -> None:
    import torch

    with torch.device("meta"):
        assert len(names(torchvision.models.resnet50(weights=None), "blocks")) == 16


def test_presets_of_a_vision_transformer(vit: nn.Module) -> None:
    assert names(vit, "blocks") == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(vit, "mlp_neurons") == [f"blocks.{i}.mlp.fc2@input" for i in range(3)]
    assert names(vit, "attention_channels") == [f"blocks.{i}.attn.proj@input" for i in range(3)]
    assert names(vit, "attention_heads") == [f"blocks.{i}.attn.proj@input:heads" for i in range(3)]


def test_a_preset_takes_a_reduction(vit: nn.Module) -> None:
    assert names(vit, "blocks:class_token") == [f"blocks.{i}:class_token" for i in range(3)]
    with pytest.raises(ModelError, match="has its own reduction 'heads'"):
        names(vit, "attention_heads:class_token")


def test_blocks_of_a_plain_module_list_are_its_items() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    assert names(Stack(), "blocks") == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("model", "first", "count"),
    [
        (lambda: torchvision.models.convnext_tiny(weights=None), "features.1.0", 18),
        (lambda: torchvision.models.mobilenet_v3_small(weights=None), "features.1", 11),
        (lambda: torchvision.models.vit_b_16(weights=None), "encoder.layers.encoder_layer_0", 12),
        (lambda: timm.create_model("efficientnet_b0"), "blocks.0.0", 16),
        (lambda: timm.create_model("convnext_atto"), "stages.0.blocks.0", 12),
    ],
)
def test_blocks_of_other_networks(model, first: str, count: int) -> None:
    import torch

    with torch.device("meta"):
        found = names(model(), "blocks")
    assert (found[0], len(found)) == (first, count)


# What the second layers of all MLPs are called, and how many there are; the networks have squeeze-excite modules,
# relative-position MLPs or both where that is said.
MLPS = {
    "timm:vit_tiny_patch16_224": (r"blocks\.\d+\.mlp\.fc2", 12),
    "timm:swin_tiny_patch4_window7_224": (r"layers\.\d\.blocks\.\d\.mlp\.fc2", 12),
    "timm:convnext_atto": (r"stages\.\d\.blocks\.\d\.mlp\.fc2", 12),
    "timm:mixer_s32_224": (r"blocks\.\d\.mlp_(tokens|channels)\.fc2", 16),
    "timm:xcit_nano_12_p16_224": (r"(blocks|cls_attn_blocks)\.\d+\.mlp\.fc2", 14),
    "timm:eva02_base_patch14_224": (r"blocks\.\d+\.mlp\.fc2", 12),
    "timm:pvt_v2_b0": (r"stages\.\d\.blocks\.\d\.mlp\.fc2", 8),
    "timm:maxvit_pico_rw_256": (r".*\.(attn_block|attn_grid)\.mlp\.fc2", 22),  # squeeze-excite
    "timm:maxvit_rmlp_pico_rw_256": (r".*\.(attn_block|attn_grid)\.mlp\.fc2", 22),  # both
    "timm:coatnet_nano_rw_224": (r"stages\.[23]\.blocks\.\d\.mlp\.fc2", 9),  # squeeze-excite
    "timm:fastvit_t8": (r"stages\.\d\.blocks\.\d\.mlp\.fc2", 10),  # squeeze-excite
    "timm:swinv2_cr_tiny_224": (r"stages\.\d\.blocks\.\d\.mlp\.fc2", 12),  # relative positions
    "torchvision:vit_b_16": (r"encoder\.layers\.encoder_layer_\d+\.mlp\.3", 12),
    "torchvision:swin_t": (r"features\.\d\.\d\.mlp\.3", 12),
    "torchvision:convnext_tiny": (r"features\.\d\.\d\.block\.5", 18),
    "torchvision:maxvit_t": (
        r"blocks\.\d\.layers\.\d\.layers\.(window|grid)_attention\.mlp_layer\.3",
        22,
    ),  # squeeze-excite
}


def on_meta(name: str) -> nn.Module:
    import torch

    library, _, model = name.partition(":")
    with torch.device("meta"):
        return timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None)


@pytest.mark.parametrize("name", MLPS)
def test_mlp_neurons_are_those_of_all_mlps_and_of_nothing_else(name: str) -> None:
    pattern, count = MLPS[name]
    found = names(on_meta(name), "mlp_neurons")
    assert len(found) == count
    assert all(re.fullmatch(f"{pattern}@input", layer) for layer in found), found


@pytest.mark.parametrize(
    "name",
    ["timm:regnety_002", "timm:seresnet18", "timm:gcresnet33ts", "timm:resnest14d", "torchvision:efficientnet_b0"],
)
def test_networks_whose_only_pairs_of_layers_gate_have_no_mlp_neurons(name: str) -> None:
    with pytest.raises(ModelError, match="the preset 'mlp_neurons' finds nothing"):
        names(on_meta(name), "mlp_neurons")


class Gate(nn.Module):
    """Squeeze-excite as it is often written: by linear layers, with the sigmoid in a function."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(8, 4), nn.Linear(4, 8)) if apart else (None, None)
        self.excite = None if apart else nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

    def forward(self, images):
        pooled = images.mean((2, 3))
        gates = self.fc2(self.fc1(pooled).relu()) if self.excite is None else self.excite(pooled)
        return images * gates.sigmoid()[:, :, None, None]


class ChannelAttention(nn.Module):
    """The factors alone, of means and maxima, as in CBAM; the network multiplies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, images):
        pooled = (images.mean((2, 3), keepdim=True), images.amax((2, 3), keepdim=True))
        return sum(self.fc2(self.fc1(each).relu()) for each in pooled).sigmoid()


class Cbam(nn.Module):
    """One such gate beside everything else, so that nothing around it returns an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.ca, self.head = nn.Conv2d(3, 16, 3), ChannelAttention(16), nn.Linear(16, 5)

    def forward(self, images):
        hidden = self.conv(images)
        return self.head((hidden * self.ca(hidden)).mean((2, 3)))


def test_gates_that_return_factors_alone_have_no_mlp_neurons() -> None:
    with pytest.raises(ModelError, match="finds nothing"):
        names(Cbam(), "mlp_neurons")
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8)))
    assert names(model, "mlp_neurons") == ["1.2@input"]


def test_gates_of_a_users_own_network_are_told_from_its_mlps() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(Gate(apart=True), Gate(apart=False), encoder, nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)))
    training = [module.training for module in model.modules()]
    assert names(model, "mlp_neurons") == ["2.linear2@input", "3.1@input"]
    assert [module.training for module in model.modules()] == training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_blocks_says_what_to_name_instead() -> None:
    with pytest.raises(ModelError, match=r"the preset 'blocks' finds nothing in Sequential.*name modules.*0, 1"):
        names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "blocks")


def test_a_star_stays_within_one_part_of_a_name_and_two_stars_do_not(resnet: nn.Module) -> None:
    assert names(resnet, "layer4.*") == ["layer4.0", "layer4.1"]
    assert names(resnet, "layer[34].0") == ["layer3.0", "layer4.0"]
    assert len(names(resnet, "**.bn1")) == 9  # the stem's and one per block
    assert names(resnet, "layer1.?.bn1@input") == ["layer1.0.bn1@input", "layer1.1.bn1@input"]


def test_layers_come_in_the_order_of_the_model_and_once(resnet: nn.Module) -> None:
    assert names(resnet, "layer4.1", "layer1.*", "layer1.0", "layer1.0:mean") == [
        "layer1.0",
        "layer1.0:mean",
        "layer1.1",
        "layer4.1",
    ]


def test_an_unknown_layer_is_refused_with_the_nearest_names(resnet: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"ResNet has no layer 'layer4.2': did you mean .*layer4\."):
        names(resnet, "layer4.2")
    with pytest.raises(ModelError, match=r"has no layer 'blokcs': did you mean blocks"):
        names(resnet, "blokcs")
    with pytest.raises(ModelError, match=r"has no layer 'stage\*'"):
        names(resnet, "stage*")
    with pytest.raises(ModelError, match="no layers are named"):
        names(resnet)
