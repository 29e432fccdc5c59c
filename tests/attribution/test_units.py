"""Which tokens and which dimension a reduction takes, against what each network is known to hold."""

from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.attribution import ActivationGradient, AttributionError, Attributor, Optimizations, trace_layers
from codec_dist.models import LayerKey


def hidden_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a module returns, by a plain hook."""
    kept = []
    with torch.no_grad():
        handle = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: kept.append(output))
        model.eval()(images)
    handle.remove()
    return kept[0]


def reduced(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """The engine's sum over positions of a layer's activations."""
    # Which optimisations the model is fit for does not matter here.
    plain = Optimizations(inplace=False, fold_batchnorm=False, channels_last=False)
    result = Attributor(model, [layer], ActivationGradient(), activations=True, optimizations=plain)(images)[layer]
    return result.activation_positive + result.activation_negative


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


# --- tokens ----------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """The place of the class token and of the patches among a block's tokens; None where there are none."""

    class_token: int | None
    patches: slice | None


NONE, FIRST = Tokens(None, slice(None)), Tokens(0, slice(1, None))
SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
CASES: dict[str, tuple[dict[str, object], dict[str, Tokens]]] = {
    "vit_tiny_patch16_224": (SMALL_VIT, {"blocks.0": FIRST, "blocks.1": FIRST, "blocks.1.mlp": FIRST, "norm": FIRST}),
    "vit_medium_patch16_reg1_gap_256": (SMALL_VIT, {"blocks.1": Tokens(None, slice(1, None))}),
    "vit_medium_patch16_reg4_gap_256": (SMALL_VIT, {"blocks.1": Tokens(None, slice(4, None))}),
    "vit_small_patch14_reg4_dinov2": (SMALL_VIT, {"blocks.0": Tokens(0, slice(5, None))}),
    "vit_relpos_small_patch16_224": (SMALL_VIT, {"blocks.0": NONE}),
    "vit_relpos_base_patch16_cls_224": (SMALL_VIT, {"blocks.0": FIRST, "blocks.0.attn": FIRST}),
    "deit_tiny_distilled_patch16_224": (SMALL_VIT, {"blocks.1": Tokens(0, slice(2, None))}),
    "beit_base_patch16_224": (SMALL_VIT, {"blocks.1": FIRST}),
    "eva02_tiny_patch14_224": (SMALL_VIT, {"blocks.1": FIRST, "blocks.0.attn.proj": FIRST}),
    "cait_xxs24_224": (
        {**SMALL_VIT, "depth_token_only": 2},
        {
            "blocks.0": NONE,
            "blocks.1": NONE,
            "blocks_token_only.0": Tokens(0, None),
            "blocks_token_only.1": Tokens(0, None),
        },
    ),
    "xcit_nano_12_p16_224": (
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2},
        {"blocks.0": NONE, "blocks.1": NONE, "cls_attn_blocks.0": FIRST, "cls_attn_blocks.1": FIRST},
    ),
    "mixer_s32_224": ({"img_size": 64}, {"blocks.0": NONE}),
    "gmlp_ti16_224": ({"img_size": 32}, {"blocks.1": NONE}),
    "resmlp_12_224": ({"img_size": 32}, {"blocks.1": NONE}),
    "convit_tiny": (
        {**SMALL_VIT, "num_heads": 4, "embed_dim": 16, "local_up_to_layer": 1},
        {"blocks.0": NONE, "blocks.1": FIRST},
    ),
    "levit_128s": ({"img_size": 64}, {"stages.0.blocks.0": NONE, "stages.2.blocks.1": NONE}),
    "pit_ti_224": ({"img_size": 64}, {"transformers.0.blocks.0": FIRST, "transformers.2.blocks.1": FIRST}),
    "pit_ti_distilled_224": ({"img_size": 64}, {"transformers.1.blocks.0": Tokens(0, slice(2, None))}),
    "pvt_v2_b0": ({}, {"stages.0.blocks.0": NONE, "stages.3.blocks.1": NONE}),
    "coat_lite_tiny": ({"img_size": 64}, {"serial_blocks1.0": FIRST, "serial_blocks4.1": FIRST}),
    "hiera_tiny_224": ({"img_size": 224}, {"blocks.0": NONE, "blocks.11": NONE}),
    "volo_d1_224": ({"img_size": 64}, {"post_network.0": FIRST}),
}


def check_tokens(model: nn.Module, layer: str, held: Tokens, images: Tensor) -> None:
    hidden = hidden_of(model, layer, images)
    for name, place in (("class_token", held.class_token), ("patch_tokens", held.patches)):
        if place is None:
            with pytest.raises(AttributionError, match=f"has no {name[:5]} token"):
                Attributor(model, [f"{layer}:{name}"]).probe(images)
        else:
            chosen = hidden[:, place] if isinstance(place, int) else hidden[:, place].sum(1)
            close(reduced(model, f"{layer}:{name}", images), chosen)
    close(reduced(model, f"{layer}:tokens", images), hidden.sum(1))


def with_random_weights(model: nn.Module) -> nn.Module:
    """Learned tokens, biases and factors begin as zeros or ones, which would hide a wrong choice."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


# One of each kind in every run, all of them in the slow one.
QUICK = {"vit_tiny_patch16_224", "vit_medium_patch16_reg4_gap_256", "cait_xxs24_224", "mixer_s32_224", "levit_128s"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_class_and_patch_tokens_are_those_that_the_block_holds(name: str) -> None:
    options, layers = CASES[name]
    torch.manual_seed(0)
    model = with_random_weights(timm.create_model(name, pretrained=False, num_classes=3, **options))
    images = torch.randn(2, 3, *[options.get("img_size", 64)] * 2)
    for layer, held in layers.items():
        check_tokens(model, layer, held, images)


def test_tokens_of_torchvision_and_torch() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    check_tokens(with_random_weights(model), "encoder.layers.encoder_layer_1", FIRST, images)
    check_tokens(
        with_random_weights(Transformer("cls", "reg", late=False, last=False)),
        "encoder.1",
        Tokens(0, slice(3, None)),
        images,
    )


class Transformer(nn.Module):
    """Patches, learned tokens that join them before or after the first layer, and torch's encoder layers."""

    def __init__(self, *learned: str, late: bool, last: bool, build: object = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        for name in learned:
            self.register_parameter(f"{name}_token", nn.Parameter(torch.randn(1, 2 if name == "reg" else 1, 16)))
        layer = build or (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
        self.encoder = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Linear(16, 3)
        self.learned, self.late, self.last = learned, late, last

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for number, layer in enumerate(self.encoder):
            if number == int(self.late):
                joined = [getattr(self, f"{name}_token").expand(len(tokens), -1, -1) for name in self.learned]
                tokens = torch.cat([tokens, *joined] if self.last else [*joined, tokens], dim=1)
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


class Attention(nn.Module):
    """Attention and an MLP of the usual kind, by matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(tokens)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = (query @ key.transpose(-2, -1)).softmax(-1) @ value
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class InPlace(Attention):
    def forward(self, tokens: Tensor) -> Tensor:
        change = super().forward(tokens)
        tokens = tokens.clone()
        tokens += change
        return tokens.relu_()


@settings(deadline=None, max_examples=15)
@given(
    learned=st.lists(st.sampled_from(["cls", "reg", "dist"]), unique=True, max_size=3),
    late=st.booleans(),
    last=st.booleans(),
    build=st.sampled_from([Attention, InPlace, nn.Identity]),
    inner=st.booleans(),
)
def test_tokens_of_any_order_and_depth(learned: list[str], late: bool, last: bool, build: type, inner: bool) -> None:
    torch.manual_seed(0)
    model, images = Transformer(*learned, late=late, last=last, build=build), torch.randn(2, 3, 24, 24)
    widths = {name: 2 if name == "reg" else 1 for name in learned}
    behind = 9 if last else 0
    place = behind + sum(widths[name] for name in learned[: learned.index("cls")]) if "cls" in learned else None
    patches = slice(0, 9) if last else slice(sum(widths.values()), None)
    layer = ".proj" if inner and build is not nn.Identity else ""
    check_tokens(model, f"encoder.0{layer}", NONE if late else Tokens(place, patches), images)
    check_tokens(model, f"encoder.2{layer}", Tokens(place, patches), images)


class Assigned(Transformer):
    """Fills a tensor piece by piece, which does not show where its tokens come from."""

    def __init__(self) -> None:
        super().__init__("cls", late=False, last=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = patches.new_zeros(len(images), 17, 16)
        tokens[:, :1], tokens[:, 1:] = self.cls_token, patches
        for layer in self.encoder:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


def test_tokens_that_cannot_be_told_are_refused_unless_the_model_says_how_many_patches_it_has() -> None:
    torch.manual_seed(0)
    model, images = Assigned(), torch.randn(2, 3, 32, 32)
    for name in ("class_token", "patch_tokens"):
        with pytest.raises(AttributionError, match=r"cannot be told from the forward pass: use encoder\.1:tokens"):
            Attributor(model, [f"encoder.1:{name}"]).probe(images)
    model.num_patches = 16
    check_tokens(model, "encoder.1", FIRST, images)


# --- channels --------------------------------------------------------------------------------------------------------

# Two sizes of the image: the axis whose length stays the same holds the channels.
SIZES: dict[str, tuple[int, int, str]] = {
    "mambaout_femto": (192, 128, "stages.0.blocks.0 stages.0 stages.1.blocks.0"),
    "swin_tiny_patch4_window7_224": (112, 224, "layers.0.blocks.1 layers.1"),
    "hieradet_small": (64, 96, "blocks.0 blocks.2"),
    "convnext_atto": (160, 96, "stages.0.blocks.0 stages.1.blocks.1"),
    "convnextv2_atto": (160, 96, "stages.0.blocks.0"),
    "poolformerv2_s12": (64, 96, "stages.0.blocks.0 stages.3.blocks.1"),
    "caformer_s18": (64, 96, "stages.0.blocks.0 stages.2.blocks.0"),
    "davit_tiny": (64, 96, "stages.0.blocks.0.1 stages.0"),
    "focalnet_tiny_srf": (64, 96, "layers.0.blocks.0"),
    "edgenext_xx_small": (96, 64, "stages.0.blocks.0 stages.1.blocks.1"),
    "inception_next_atto": (160, 96, "stages.0.blocks.0"),
    "fastvit_t8": (96, 64, "stages.0.blocks.0"),
    "regnety_002": (96, 64, "s1.b1"),
    "pvt_v2_b0": (128, 64, "stages.0.blocks.0"),
}


QUICK_SIZES = {"mambaout_femto", "convnext_atto", "regnety_002"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_SIZES else pytest.mark.slow) for name in SIZES]
)
def test_the_channels_are_the_axis_that_does_not_change_with_the_size_of_the_image(name: str) -> None:
    first, second, layers = SIZES[name]
    torch.manual_seed(0)
    for size, other in ((first, second), (second, first)):
        model, compared = (
            timm.create_model(name, pretrained=False, **({"img_size": each} if "swin" in name else {}))
            for each in (size, other)
        )
        images = torch.randn(1, 3, size, size)
        for layer in layers.split():
            hidden = hidden_of(model, layer, images)
            shape = hidden_of(compared, layer, torch.randn(1, 3, other, other)).shape
            (channels,) = (axis for axis in range(1, hidden.ndim) if hidden.shape[axis] == shape[axis])
            expected = hidden.sum([axis for axis in range(1, hidden.ndim) if axis != channels])
            close(reduced(model, layer, images), expected)


class Block(nn.Module):
    """Convolutions, or a norm and linear layers, on channels that are first or last; the order stays as it is."""

    def __init__(self, kind: str, last: bool, residual: bool) -> None:
        super().__init__()
        self.kind, self.last, self.residual = kind, last, residual
        self.convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, hidden: Tensor) -> Tensor:
        inner_last = self.kind in ("linear", "norm", "scale")
        inner = hidden
        if inner_last != self.last:
            inner = hidden.permute(0, 2, 3, 1) if inner_last else hidden.permute(0, 3, 1, 2)
        if self.kind == "convolution":
            inner = self.convolution(inner)
        elif self.kind == "linear":
            inner = self.linear(self.norm(inner)).tanh()
        elif self.kind == "norm":
            inner = self.norm(inner)
        elif self.kind == "scale":
            inner = inner * self.gamma
        if inner_last != self.last:
            inner = inner.permute(0, 3, 1, 2) if inner_last else inner.permute(0, 2, 3, 1)
        return hidden + inner if self.residual else inner


class Square(nn.Module):
    """Images of 8 × 8 and 8 channels: the shape says nothing."""

    def __init__(self, kinds: list[tuple[str, bool]], last: bool) -> None:
        super().__init__()
        self.stem, self.head, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 3), last
        self.blocks = nn.ModuleList(Block(kind, last, residual) for kind, residual in kinds)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        hidden = hidden.permute(0, 2, 3, 1) if self.last else hidden
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((1, 2) if self.last else (2, 3)))


KINDS = st.tuples(st.sampled_from(["convolution", "linear", "norm", "scale", "nothing"]), st.booleans())


@settings(deadline=None, max_examples=25)
@given(kinds=st.lists(KINDS, min_size=1, max_size=3), last=st.booleans())
def test_channels_of_square_tensors(kinds: list[tuple[str, bool]], last: bool) -> None:
    torch.manual_seed(0)
    model, images = Square(kinds, last), torch.randn(2, 3, 8, 8)
    for number in range(len(kinds)):
        layer = f"blocks.{number}"
        hidden = hidden_of(model, layer, images)
        close(reduced(model, layer, images), hidden.sum((1, 2) if last else (2, 3)))


class Then(nn.Module):
    """A convolution and what follows it, in one block."""

    def __init__(self, following: nn.Module) -> None:
        super().__init__()
        self.conv, self.following = nn.Conv2d(3, 8, 3, padding=1), following

    def forward(self, images: Tensor) -> Tensor:
        return self.following(self.conv(images))


FOLLOWING = [
    *(nn.ReLU6(True), nn.LeakyReLU(inplace=True), nn.ELU(), nn.CELU(), nn.SELU(True), nn.PReLU(), nn.PReLU(8)),
    *(nn.RReLU(), nn.Hardswish(True), nn.Hardsigmoid(), nn.Hardtanh(inplace=True), nn.Mish(True), nn.SiLU()),
    *(nn.GELU("tanh"), nn.Softplus(), nn.Softshrink(), nn.Tanhshrink(), nn.LogSigmoid(), nn.Softmax2d()),
    *(nn.Dropout2d(), nn.GLU(1), nn.LocalResponseNorm(2), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8)),
    *(nn.PixelShuffle(2), nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.LPPool2d(2, 2)),
    *(nn.ChannelShuffle(2), nn.ZeroPad2d(1), nn.AdaptiveMaxPool2d(3)),
]  # fmt: skip


@pytest.mark.parametrize("following", FOLLOWING, ids=lambda module: type(module).__name__)
def test_what_follows_a_convolution_leaves_its_channels_where_they_are(following: nn.Module) -> None:
    model, images = nn.Sequential(Then(following), nn.Flatten(), nn.LazyLinear(2)).eval(), torch.randn(1, 3, 8, 8)
    model(images)
    assert trace_layers(model, [LayerKey("0")], images)[LayerKey("0")].channel_axis == 1
