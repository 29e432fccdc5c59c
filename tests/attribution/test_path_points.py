"""Points of the path: errors of intervals, learned points, and refinement of each image's path."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.attribution import (
    Adaptive,
    AttributionError,
    Attributor,
    IntegratedGradients,
    NotFiniteError,
    PowerPoints,
    Rank,
    TopK,
    UniformPoints,
    choose_path,
    learn_points,
    relative_residual,
)

Pair = tuple[nn.Module, Tensor]


class Kink(nn.Module):
    """T = max(0, u · x - 0.3 u · x₁): its only kink lies at α = 0.3 for every multiple of the image x₁."""

    def __init__(self, image: Tensor, place: float = 0.3) -> None:
        super().__init__()
        self.layer = nn.Linear(image.numel(), 1)
        with torch.no_grad():
            self.layer.weight.copy_(image.flatten()[None] / image.square().sum())
            self.layer.bias.fill_(-place)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1)).relu()


def small_net(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)]
    return nn.Sequential(*layers).double()


def slow_path(net: nn.Sequential, image: Tensor, fractions: list[float], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """h, g and T of one image along its path, one point after another."""
    chosen, hidden, gradients, targets = int(net(image[None]).argmax()), [], [], []
    for fraction in fractions:
        h = net[: layer + 1](fraction * image[None]).detach().requires_grad_()
        target = net[layer + 1 :](h)[0, chosen]
        gradients.append(torch.autograd.grad(target, h)[0].flatten())
        hidden.append(h.detach().flatten())
        targets.append(target.detach())
    return torch.stack(hidden), torch.stack(gradients), torch.stack(targets)


def slow_error(path: tuple[Tensor, Tensor, Tensor], below: int, above: int) -> float:
    h, g, t = path
    return float((0.5 * (g[below] + g[above]) * (h[above] - h[below])).sum() - (t[above] - t[below]))


def test_interval_errors_are_those_of_a_walk_by_hand() -> None:
    net, images = small_net(0), torch.randn(3, 4).double()
    fractions = [0.0, 0.1, 0.35, 0.8, 1.0]
    attributor = Attributor(net, ["0", "2"], IntegratedGradients(2, points="uniform"), TopK(frozen=True))
    found = attributor.interval_errors(images, fractions)
    assert [place.layer for place in found.places] == ["0", "2"]
    for place, layer in enumerate((0, 2)):
        for number, image in enumerate(images):
            path = slow_path(net, image, fractions, layer)
            assert float(found.changes[place, number]) == pytest.approx(float(path[2][-1] - path[2][0]), rel=1e-9)
            for below in range(5):
                for above in range(5):
                    expected = slow_error(path, below, above)
                    assert float(found.errors[place, number, below, above]) == pytest.approx(expected, abs=1e-12)


def test_errors_of_intervals_add_up_to_the_residual_whatever_is_merged(cnn: Pair) -> None:
    model, images = cnn
    model, images = model.double(), images[:3].double()
    fractions = PowerPoints(2).fractions(9)
    layers = ["blocks.0", "blocks.1"]
    attributor = Attributor(model, layers, IntegratedGradients(2, points="uniform"), [TopK(frozen=True), Rank(2)])
    errors = attributor.interval_errors(images, fractions)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        order = torch.randperm(8, generator=generator) + 1
        points = list(range(10))
        for removed in order[: int(torch.randint(0, 9, (), generator=generator))].tolist():
            points.remove(removed)  # merges the two intervals that meet there
        method = IntegratedGradients(points=[fractions[point] for point in points])
        result = attributor.with_method(method)(images)
        of_targets = {result.target: result, **result.others}
        for place, sums in zip(errors.places, errors.of(points).sum(dim=2), strict=True):
            residual = of_targets[place.target][place.layer].completeness
            torch.testing.assert_close(sums, residual, rtol=1e-8, atol=1e-10)


def test_more_than_fits_is_measured_in_several_walks(cnn: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = cnn
    attributor = Attributor(model.double(), ["blocks"], IntegratedGradients(2, points="uniform"))
    fractions = UniformPoints().fractions(6)
    whole = attributor.interval_errors(images[:2].double(), fractions)
    monkeypatch.setattr("codec_dist.attribution.interval_errors.KEPT_BYTES", {"cpu": 1})
    parts = attributor.interval_errors(images[:2].double(), fractions)
    assert parts.places == whole.places
    torch.testing.assert_close(parts.errors, whole.errors, rtol=1e-10, atol=1e-12)


def test_without_a_cut_layer_errors_are_those_of_the_images_themselves() -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.first(images).tanh() * self.second(images)

    torch.manual_seed(0)
    net, images = TwoWays().double(), torch.randn(5, 4).double()
    attributor = Attributor(net, ["first"], IntegratedGradients(3), TopK(frozen=True))
    fractions = [0.0, 0.2, 1.0]
    found = attributor.interval_errors(images, fractions)
    assert [place.layer for place in found.places] == ["input"]
    image = images[0]
    chosen = int(net(image[None]).argmax())
    slopes, values = [], []
    for fraction in fractions:
        point = (fraction * image[None]).requires_grad_()
        value = net(point)[0, chosen]
        slopes.append(float(torch.autograd.grad(value, point)[0] @ image))
        values.append(float(value))
    expected = 0.5 * (slopes[1] + slopes[2]) * 0.8 - (values[2] - values[1])
    assert float(found.errors[0, 0, 1, 2]) == pytest.approx(expected, rel=1e-9)
    assert choose_path(attributor, images).layer == "input"


@pytest.mark.parametrize("points", ["learned", "uniform", {"name": "power", "options": {"exponent": 3}}, [0, 0.9, 1]])
def test_a_linear_network_is_exact_with_any_points(points: object) -> None:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    steps = None if isinstance(points, list) else 1
    result = Attributor(net, ["0"], IntegratedGradients(steps, points=points), TopK(frozen=True))(images)
    assert float(result["0"].completeness.abs().max()) < 1e-12
    change = result.target_value - result.baseline_value
    torch.testing.assert_close(result["0"].net.sum(dim=1), change)


def kinked(kinks: list[float]) -> tuple[Attributor, Tensor]:
    """An engine for a network with one kink, and an image for each place where it is to lie."""
    image = torch.rand(1, 3, 4, 4).double() + 0.5
    scales = torch.tensor([0.3 / kink for kink in kinks]).double()
    return Attributor(Kink(image), ["layer"], IntegratedGradients(4)), image * scales.reshape(-1, 1, 1, 1)


def test_points_settle_around_the_only_kink() -> None:
    attributor, images = kinked([0.26, 0.28, 0.3, 0.32, 0.34, 0.36])
    result = attributor(images)
    choice = attributor.path_choice
    assert choice is not None
    # Elsewhere there is no error; an interval with the kink in it misses at most half of its width.
    inner = choice.fractions[1:-1]
    assert all(0.15 < fraction < 0.5 for fraction in inner), inner
    uniform = attributor.with_method(IntegratedGradients(4, points="uniform"))(images)
    assert float(uniform["layer"].completeness.abs().mean()) > 2 * float(result["layer"].completeness.abs().mean())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 12))
def test_learned_points_are_never_worse_than_uniform_on_their_probe(seed: int, steps: int, count: int) -> None:
    net = small_net(seed)
    images = 3 * torch.randn(count, 4).double()
    attributor = Attributor(net, ["0", "2"], IntegratedGradients(steps), TopK(frozen=True))
    medians = {}
    for points in ("learned", "uniform"):
        result = attributor.with_method(IntegratedGradients(steps, points=points))(images)
        values = (result.target_value, result.baseline_value)
        found = [float(relative_residual(result[layer].completeness, *values).quantile(0.5)) for layer in ("0", "2")]
        medians[points] = max(found), sum(found)
    for learned, uniform in zip(medians["learned"], medians["uniform"], strict=True):
        assert learned <= uniform * (1 + 1e-9) + 1e-12


def test_a_few_images_of_another_kind_do_not_decide() -> None:
    kinks = [0.26, 0.28, 0.3, 0.32, 0.34, 0.36] * 3
    attributor, images = kinked([*kinks, 0.004, 0.97])
    choice = choose_path(attributor, images)
    usual = images[: len(kinks)]
    learned, uniform = (
        float(attributor.with_method(IntegratedGradients(4, points=points))(usual)["layer"].completeness.abs().mean())
        for points in (list(choice.fractions), "uniform")
    )
    assert learned < 0.7 * uniform


def test_where_the_target_hardly_changes_uniform_points_serve() -> None:
    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.layer(images).tanh()
            return 1e-300 * (hidden - hidden.detach().round(decimals=1)).cumsum(dim=1)

    torch.manual_seed(0)
    result = Attributor(Still().double(), ["layer"], IntegratedGradients(4))(torch.zeros(6, 4).double())
    assert bool(result["layer"].positive.isfinite().all())
    assert result.target_value.tolist() == result.baseline_value.tolist()


def test_where_nothing_serves_better_points_are_uniform() -> None:
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double(), torch.randn(8, 4).double()
    choice = choose_path(Attributor(net, ["0"], IntegratedGradients(8), TopK(frozen=True)), images)
    assert choice.fractions == UniformPoints().fractions(8)


def test_a_probe_too_small_to_learn_from_gives_points_of_a_rule() -> None:
    net = small_net(5)
    image = 3 * torch.randn(1, 4).double()
    choice = choose_path(Attributor(net, ["0", "2"], IntegratedGradients(6), TopK(frozen=True)), image)
    rules = [UniformPoints(), PowerPoints(2.0), PowerPoints(3.0)]
    furthest = [
        max(abs(found - wanted) for found, wanted in zip(choice.fractions, rule.fractions(6), strict=True))
        for rule in rules
    ]
    assert min(furthest) < 0.03


def test_the_memory_of_learning_does_not_bound_what_follows(cnn: Pair) -> None:
    model, images = cnn
    budget, adaptive = 4_000_000, {"tolerance": 0.01, "most": 20}
    learning = Attributor(model, ["blocks"], IntegratedGradients(3, adaptive=adaptive), memory=budget)
    learning(images)
    given = IntegratedGradients(points=[0, 0.1, 0.5, 1], adaptive=adaptive)
    direct = Attributor(model, ["blocks"], given, memory=budget)
    direct(images)
    assert learning.microbatch == direct.microbatch


def test_learning_needs_as_many_dense_points() -> None:
    errors = Attributor(small_net(1), ["0"], IntegratedGradients(2)).interval_errors(
        torch.randn(4, 4).double(), [0.0, 0.5, 1.0]
    )
    assert learn_points(errors, 2).points == (0, 1, 2)
    with pytest.raises(AttributionError, match="3 points has no 4 points"):
        learn_points(errors, 3)


def test_an_image_that_is_not_finite_is_named(cnn: Pair) -> None:
    model, images = cnn
    images = images[:4].clone()
    images[2, 0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="sample 2 of the batch"):
        Attributor(model, ["blocks"], IntegratedGradients(3))(images)


# --- refinement -------------------------------------------------------------------------------------------------------


def test_with_infinite_tolerance_refinement_changes_nothing(cnn: Pair) -> None:
    model, images = cnn
    plain = Attributor(model, ["blocks"], IntegratedGradients(4))
    expected = plain(images)
    refining = plain.with_method(plain.method.with_adaptive({"tolerance": math.inf}))
    found = refining(images)
    assert found.steps is not None
    assert found.steps.tolist() == [4] * len(images)
    for layer in expected:
        assert torch.equal(found[layer].positive, expected[layer].positive)
        assert torch.equal(found[layer].negative, expected[layer].negative)
        assert torch.equal(found[layer].completeness, expected[layer].completeness)


def slow_refinement(
    net: nn.Sequential, image: Tensor, fractions: list[float], adaptive: Adaptive
) -> tuple[int, Tensor]:
    """Steps of one image's refined path, and its contributions at layer 0."""
    fractions = list(fractions)
    while True:
        paths = [slow_path(net, image, fractions, layer) for layer in (0, 2)]
        change = abs(float(paths[0][2][-1] - paths[0][2][0]))
        pairs = list(pairwise(range(len(fractions))))
        errors = [[slow_error(path, *pair) / change for pair in pairs] for path in paths]
        if max(abs(sum(each)) for each in errors) <= adaptive.tolerance or len(pairs) >= adaptive.most:
            h, g, _ = paths[0]
            return len(pairs), (0.5 * (g[1:] + g[:-1]) * (h[1:] - h[:-1])).sum(dim=0)
        worst = max(range(len(pairs)), key=lambda number: max(abs(each[number]) for each in errors))
        fractions.insert(worst + 1, (fractions[worst] + fractions[worst + 1]) / 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.05, 0.005]))
def test_refinement_is_that_of_each_image_by_hand(seed: int, tolerance: float) -> None:
    net = small_net(seed)
    images = 4 * torch.randn(5, 4).double()
    adaptive, fractions = Adaptive(tolerance, most=9), [0.0, 0.3, 1.0]
    method = IntegratedGradients(points=fractions, adaptive=adaptive)
    result = Attributor(net, ["0", "2"], method, TopK(frozen=True))(images)
    assert result.steps is not None
    for number, image in enumerate(images):
        steps, expected = slow_refinement(net, image, fractions, adaptive)
        assert int(result.steps[number]) == steps
        torch.testing.assert_close(result["0"].net[number], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("baseline", ["zeros", {"name": "blur", "options": {"sigma": 2.0}}], ids=str)
@pytest.mark.parametrize("microbatch", [None, 1, 3])
def test_a_batch_and_its_single_images_agree(cnn: Pair, baseline: object, microbatch: int | None) -> None:
    model, images = cnn
    model, images = model.double(), torch.cat([0.1 * images, images, 4 * images]).double()
    method = IntegratedGradients(points=[0, 0.2, 1], baseline=baseline, adaptive={"tolerance": 0.1, "most": 8})
    targets = [TopK(2, frozen=True), Rank(1)]
    together = Attributor(model, ["blocks"], method, targets, microbatch=microbatch)(images)
    assert together.steps is not None
    assert len(set(together.steps.tolist())) > 1
    for number in range(len(images)):
        alone = Attributor(model, ["blocks"], method, targets)(images[number : number + 1])
        assert alone.steps is not None
        assert int(alone.steps) == int(together.steps[number])
        for layer in together:
            for name in (None, *together.others):
                of_batch, of_one = (each if name is None else each.others[name] for each in (together, alone))
                torch.testing.assert_close(
                    of_batch[layer].positive[number], of_one[layer].positive[0], rtol=1e-9, atol=1e-10
                )
                torch.testing.assert_close(of_batch[layer].completeness[number], of_one[layer].completeness[0])


def test_refined_images_are_within_tolerance_or_have_the_most_steps(cnn: Pair) -> None:
    model, images = cnn
    images = torch.cat([images, 3 * images, 0.3 * images])
    method = IntegratedGradients(3, points="uniform", adaptive={"tolerance": 0.01, "most": 12})
    result = Attributor(model.double(), ["blocks"], method)(images.double())
    assert result.steps is not None
    change = (result.target_value - result.baseline_value).abs()
    worst = torch.stack([layer.completeness.abs() / change for layer in result.values()]).amax(dim=0)
    assert bool(((worst <= 0.01 * (1 + 1e-9)) | (result.steps == 12)).all())
    assert int(result.steps.min()) < 12
    maps = Attributor(model, ["blocks.0"], method).maps(images[:2].double(), {"blocks.0": [1]})
    single = Attributor(model, ["blocks.0"], method)(images[:2].double())
    torch.testing.assert_close(maps["blocks.0"].flatten(1).sum(dim=1), single["blocks.0"].net[:, 1])


def test_refinement_without_a_cut_layer_is_refused(cnn: Pair) -> None:
    model, images = cnn
    method = IntegratedGradients(2, points="uniform", adaptive={})
    with pytest.raises(AttributionError, match="adaptive needs a cut layer"):
        Attributor(model, ["blocks.1.bn2"], method)(images)
    with pytest.raises(AttributionError, match="allow_mixing"):
        Attributor(model, ["blocks"], method, allow_mixing=True)(images)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_uniform_and_power_points() -> None:
    assert UniformPoints().fractions(4) == (0, 0.25, 0.5, 0.75, 1)
    assert PowerPoints(2).fractions(2) == (0, 0.25, 1)
    with pytest.raises(AttributionError, match="lower the exponent"):
        PowerPoints(400).fractions(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": [0, 0.5]}, "must ascend from 0 to 1"),
        ({"points": [0, 0.5, 0.5, 1]}, "must ascend from 0 to 1"),
        ({"points": [0]}, "at least the two numbers"),
        ({"points": [0, "half", 1]}, "not all numbers"),
        ({"points": [0, math.nan, 1]}, "must ascend"),
        ({"points": "cubic"}, "unknown path points 'cubic'"),
        ({"points": {"kind": "power"}}, "bad path points"),
        ({"points": {"name": "power", "options": {"exponent": 0}}}, "exponent is 0"),
        ({"points": [0, 0.5, 1], "steps": 3}, "3 points are given, but steps is 3"),
        ({"points": [0, 0.5, 1], "steps": "auto"}, "steps cannot be `auto`"),
        ({"adaptive": {"tolerance": -1}}, "tolerance is -1"),
        ({"adaptive": {"most": 0}}, "most is 0"),
        ({"adaptive": {"steps": 3}}, "bad adaptive"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without type checks
    with pytest.raises(AttributionError, match=message):
        IntegratedGradients(**options)
