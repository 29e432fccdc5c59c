"""The fewest steps that are complete enough, and contributions at every position on demand."""

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import (
    METHODS,
    ActivationGradient,
    AttributionError,
    Attributor,
    IntegratedGradients,
    NotFiniteError,
    Rank,
    TopK,
    choose_path,
    relative_residual,
)

Pair = tuple[nn.Module, Tensor]
TOLERANCE = 0.03


def median_residual(model: nn.Module, images: Tensor, steps: int, layers: list[str]) -> float:
    result = Attributor(model, layers, IntegratedGradients(steps, points="uniform"))(images)
    values = (result.target_value, result.baseline_value)
    return max(float(relative_residual(layer.completeness, *values).quantile(0.5)) for layer in result.values())


def test_auto_takes_the_fewest_steps_that_are_complete_enough(cnn: Pair) -> None:
    model, images = cnn
    model, images = model.double(), 2 * torch.randn(20, 3, 16, 16).double()
    attributor = Attributor(
        model, ["blocks.0", "blocks.1"], IntegratedGradients("auto", tolerance=TOLERANCE, points="uniform")
    )
    result = attributor(images)
    choice = attributor.path_choice
    assert choice is not None
    assert choice.images == 20
    assert attributor.method.steps == choice.steps > 1
    tried = dict(choice.measured)
    assert list(tried)[-1] == choice.steps
    for steps, measured in tried.items():
        assert measured == pytest.approx(median_residual(model, images, steps, ["blocks.0", "blocks.1"]), rel=1e-6)
        assert (measured < TOLERANCE) == (steps == choice.steps)
    expected = Attributor(model, ["blocks.1"], IntegratedGradients(choice.steps, points="uniform"))(images)
    torch.testing.assert_close(result["blocks.1"].net, expected["blocks.1"].net)


def test_auto_is_settled_by_the_first_batch(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["blocks"], METHODS.build("integrated_gradients", {"steps": "auto"}))
    attributor(images)
    first = attributor.path_choice
    attributor(5 * images)
    assert attributor.path_choice is first


def test_auto_looks_at_every_target(cnn: Pair) -> None:
    model, images = cnn
    method = IntegratedGradients("auto", tolerance=TOLERANCE, points="uniform")
    steps = [
        choose_path(Attributor(model, ["blocks.1"], method, target), images).steps
        for target in (TopK(1), Rank(3), [TopK(1), Rank(3)])
    ]
    assert steps[2] >= max(steps[:2])


def test_auto_without_a_cut_layer_or_a_reachable_tolerance_is_refused(cnn: Pair) -> None:
    model, images = cnn
    with pytest.raises(AttributionError, match="need a cut layer"):
        Attributor(model, ["blocks.1.bn2"], IntegratedGradients("auto"))(images)
    for points, most in (("uniform", 256), ("learned", 60)):
        with pytest.raises(AttributionError, match=f"with {most} steps the median relative residual of layer blocks"):
            Attributor(model, ["blocks.0"], IntegratedGradients("auto", tolerance=1e-12, points=points))(images[:1])
    with pytest.raises(AttributionError, match="for integrated gradients alone"):
        choose_path(Attributor(model, ["blocks"], ActivationGradient()), images)
    with pytest.raises(AttributionError, match="nothing to choose"):
        choose_path(Attributor(model, ["blocks"], IntegratedGradients(3, points="uniform")), images)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "many", True])
def test_odd_numbers_of_steps_are_refused(steps, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without type checks
    with pytest.raises(AttributionError, match=r"steps is .*: it must be a whole number from 1 up, or `auto`"):
        METHODS.build("integrated_gradients", {"steps": steps})


def test_maps_add_up_to_the_reduced_contributions(cnn: Pair, vit: Pair) -> None:
    for (model, images), layers in ((cnn, ["blocks.0", "blocks.1:mean"]), (vit, ["blocks.1", "blocks.0:patch_tokens"])):
        attributor = Attributor(model.double(), layers, IntegratedGradients(3, points="uniform"), microbatch=2)
        maps = attributor.maps(images.double(), {layer: [5, 0] for layer in layers})
        result = attributor(images.double())
        for layer in layers:
            found = maps[layer].flatten(2)
            total = found.clamp(min=0).mean(2) if layer.endswith("mean") else found.clamp(min=0).sum(2)
            torch.testing.assert_close(total, result[layer].positive[:, [5, 0]])
        shape = maps[layers[0]].shape
        assert shape == ((3, 2, 16, 16) if layers[0] == "blocks.0" else (3, 2, 17))


def test_maps_that_are_not_finite_are_refused(cnn: Pair) -> None:
    model, images = cnn
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"maps of layer blocks\.0 are not finite") as caught:
        Attributor(model, ["blocks.0"], IntegratedGradients(2, points="uniform")).maps(images, {"blocks.0": [0]})
    assert caught.value.samples == (1,)


def test_maps_of_what_there_is_not_are_refused(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(model, ["blocks.0"])
    with pytest.raises(AttributionError, match=r"this engine explains blocks\.0"):
        attributor.maps(images, {"blocks.1": [0]})
    with pytest.raises(AttributionError, match="it has 8, from 0"):
        attributor.maps(images, {"blocks.0": [8]})
    with pytest.raises(AttributionError, match=r"channels \[\] of layer"):
        attributor.maps(images, {"blocks.0": []})
