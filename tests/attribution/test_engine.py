"""What the engine promises beside its numbers: cost, invariance, cuts, and clear refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import (
    ActivationGradient,
    AttributionError,
    Attributor,
    GivenClass,
    IntegratedGradients,
    NotFiniteError,
    TopK,
    TrueLabel,
    edited,
)
from codec_dist.models import LayerKey, ModelError

Network = tuple[nn.Module, Tensor, list[str]]
Pair = tuple[nn.Module, Tensor]


def test_steps_cost_as_many_passes_and_one_of_a_single_image(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["blocks"], IntegratedGradients(5, points="uniform"), microbatch=2)
    attributor.probe(images)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attributor(images)
    # Two images point by point, and the baseline once; then one image, whose four inner points go two at a time.
    assert sizes == [2] * 5 + [1] + [1] + [2] * 2


def test_a_fixed_target_costs_no_pass_more(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(
        model, ["blocks"], IntegratedGradients(5, points="uniform"), TopK(1, frozen=True), microbatch=3
    )
    attributor.probe(images)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attributor(images)
    assert sizes == [3] * 6


@pytest.mark.parametrize("target", [TopK(2), TopK(1, frozen=True), TrueLabel(), GivenClass(2)], ids=lambda t: t.name)
def test_results_do_not_depend_on_batches(cnn: Pair, target) -> None:
    model, _ = cnn
    model, images, labels = model.double(), torch.randn(5, 3, 16, 16).double(), torch.tensor([0, 3, 1, 5, 2])
    arguments = {"target": target, "activations": True, "gradients": True}
    method = IntegratedGradients(points="uniform")
    one_by_one = [Attributor(model, ["blocks"], method, **arguments)(images[[row]], labels[[row]]) for row in range(5)]
    for microbatch in (1, 2, 5, None):
        together = Attributor(model, ["blocks"], method, microbatch=microbatch, **arguments)(images, labels)
        for row, alone in enumerate(one_by_one):
            torch.testing.assert_close(together.target_value[row], alone.target_value[0])
            torch.testing.assert_close(together.baseline_value[row], alone.baseline_value[0])
            assert together.prediction[row] == alone.prediction[0]
            for layer in alone:
                for name, values in alone[layer].quantities().items():
                    torch.testing.assert_close(together[layer].quantities()[name][row], values[0])
                torch.testing.assert_close(together[layer].completeness[row], alone[layer].completeness[0])


def test_a_result_maps_layers_to_numbers_in_the_order_of_the_model(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["head@input", "blocks", "blocks.0:mean"])
    result = attributor(images)
    assert list(result) == ["blocks.0", "blocks.0:mean", "blocks.1", "blocks.2", "head@input"]
    assert tuple(result) == attributor.layers
    assert {layer: values.positive.shape[1] for layer, values in result.items()} == attributor.channels
    assert torch.equal(result.prediction, model.eval()(images).argmax(1))
    torch.testing.assert_close(result.target_value, model(images).amax(1).detach())
    assert list(result["blocks.0"].quantities()) == ["contribution-positive", "contribution-negative"]
    with pytest.raises(KeyError):
        result["blocks.3"]


def test_channels_are_known_after_a_probe(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["blocks"])
    with pytest.raises(AttributionError, match="call probe"):
        attributor.channels  # noqa: B018
    assert attributor.probe(images[:1]) == {"blocks.0": 8, "blocks.1": 12, "blocks.2": 12} == attributor.channels


def test_a_cut_is_a_layer_without_which_the_image_has_no_gradient(network: Network) -> None:
    model, images, layers = network
    attributor = Attributor(model, layers)
    result = attributor(images)
    literal = copy.deepcopy(model).eval()
    for module in literal.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for layer, is_cut in attributor.cuts.items():
        start = images.clone().requires_grad_()
        with edited(literal, {LayerKey.parse(layer): lambda hidden: hidden.detach().clone()}):
            value = literal(start).amax(1).sum()
        (gradient,) = torch.autograd.grad(value, start, allow_unused=True) if value.requires_grad else (None,)
        assert is_cut == (gradient is None), layer
        assert (result[layer].completeness is not None) == is_cut
    assert set(attributor.cuts.values()) == ({True} if isinstance(model, nn.Sequential) else {True, False})


def test_other_methods_have_no_residual_and_no_baseline(cnn: Pair) -> None:
    model, images = cnn
    result = Attributor(model, ["blocks"], ActivationGradient())(images)
    assert all(layer.completeness is None for layer in result.values())
    assert result.baseline_value.isnan().all()


def test_it_works_inside_no_grad_and_inference_mode(cnn: Pair) -> None:
    model, images = cnn
    expected = Attributor(model, ["stem@input", "blocks"])(images)
    with torch.no_grad():
        frozen = Attributor(model, ["stem@input", "blocks"])(images)
    with torch.inference_mode():
        inferred = Attributor(model, ["stem@input", "blocks"])(images + 0)
    for layer in expected:
        assert torch.equal(frozen[layer].positive, expected[layer].positive)
        assert torch.equal(inferred[layer].positive, expected[layer].positive)
    assert not any(values.positive.requires_grad for values in expected.values())


def test_half_precision_models_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    images = torch.rand(2, 1, 8, 8)
    wide = Attributor(model, ["0"], activations=True)(images)["0"]
    narrow = Attributor(copy.deepcopy(model).bfloat16(), ["0"], activations=True)(images)["0"]
    assert narrow.positive.dtype == narrow.activation_positive.dtype == narrow.completeness.dtype == torch.float32
    for name, values in wide.quantities().items():
        assert torch.linalg.norm(narrow.quantities()[name] - values) < 0.05 * torch.linalg.norm(values)


def test_weights_may_change_between_calls(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["blocks"])
    before = attributor(images)["blocks.2"].net
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.bias.mul_(2)
    torch.testing.assert_close(attributor(images)["blocks.2"].net, 2 * before)


class Returns(nn.Module):
    """Returns whatever ``form`` makes of its logits."""

    def __init__(self, form) -> None:
        super().__init__()
        self.first, self.form = nn.Linear(4, 3), form

    def forward(self, images: Tensor):
        return self.form(self.first(images))


@pytest.mark.parametrize(
    ("form", "cause"),
    [
        (lambda logits: {"logits": logits}, "the model returns a dict"),
        (lambda logits: logits.sum(1), r"the model's output is \[1\] for 1 images"),
        (lambda logits: logits.sum(0, keepdim=True).expand(2, 3), r"output is \[2, 3\] for 1 images"),
        (lambda logits: logits.detach(), "layer first does not influence the target"),
        (lambda logits: logits * torch.nan, "sample 0 of the batch: the model's output is not finite"),
    ],
)
def test_an_output_that_cannot_be_explained_is_refused(form, cause: str) -> None:
    with pytest.raises(AttributionError, match=cause):
        Attributor(Returns(form), ["first"])(torch.randn(2, 4))


def test_samples_that_are_not_finite_are_named(cnn: Pair) -> None:
    model, _ = cnn
    images = torch.randn(5, 3, 16, 16)
    images[3, 0, 0, 0] = torch.nan
    images[4] = torch.inf
    with pytest.raises(NotFiniteError, match="sample 3 of the batch: its pixels are not finite") as caught:
        Attributor(model, ["blocks"], microbatch=2)(images)
    assert caught.value.samples == (3,)
    with pytest.raises(NotFiniteError) as caught:
        Attributor(model, ["blocks"])(images)
    assert caught.value.samples == (3, 4)


def test_the_first_layer_that_is_not_finite_is_named(cnn: Pair) -> None:
    model, images = cnn
    edits = {LayerKey("blocks.1"): lambda hidden: hidden * torch.inf}
    with edited(model, edits), pytest.raises(NotFiniteError, match=r"layer blocks\.1 and what follows are not finite"):
        Attributor(model, ["blocks"])(images)


def test_infinite_gradients_at_finite_values_are_found() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return self.first(images).sqrt()

    with pytest.raises(NotFiniteError, match="the gradients or contributions of layer first are not finite"):
        Attributor(Root(), ["first"])(torch.ones(1, 2))  # the square root has no slope at the baseline


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    with pytest.raises(AttributionError, match="module 1 normalises over the batch"):
        Attributor(model, ["0"])


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: IntegratedGradients(0), "steps is 0"),
        (lambda: IntegratedGradients(baseline="black", points="uniform"), "unknown baseline 'black'"),
        (lambda: TopK(0), "k is 0"),
        (lambda: Attributor(nn.Linear(2, 2), [""], microbatch=0), "microbatch is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, cause: str) -> None:
    with pytest.raises(AttributionError, match=cause):
        make()


def test_calls_that_make_no_sense_are_refused(cnn: Pair) -> None:
    model, images = cnn
    with pytest.raises(AttributionError, match="there are no images"):
        Attributor(model, ["blocks"])(images[:0])
    with pytest.raises(AttributionError, match="2 labels were given for 3 images"):
        Attributor(model, ["blocks"], target=TrueLabel())(images, torch.tensor([0, 1]))
    with pytest.raises(AttributionError, match=r"the baseline is \[3, 2, 2\], the images are \[3, 16, 16\]"):
        Attributor(model, ["blocks"], IntegratedGradients(2, torch.zeros(3, 2, 2), points="uniform"))(images)
    with pytest.raises(ModelError, match="did you mean"):
        Attributor(model, ["blocks.7"])


class OnAGraph(nn.Module):
    """Mixes channels by a sparse matrix, as networks on graphs do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.register_buffer("edges", torch.eye(4).roll(1, 0).to_sparse())

    def forward(self, images: Tensor) -> Tensor:
        return self.head((self.edges @ self.conv(images).relu().mean((2, 3)).T).T)


def test_a_model_with_sparse_tensors_is_explained() -> None:
    torch.manual_seed(0)
    model, images = OnAGraph().eval(), torch.randn(2, 3, 8, 8)
    sparse = Attributor(model, ["conv"])(images)["conv"]
    model.edges = model.edges.to_dense()
    torch.testing.assert_close(sparse.net, Attributor(model, ["conv"])(images)["conv"].net)
