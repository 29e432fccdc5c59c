"""Several targets share the forward passes, users bring their own, and each equals the same target alone."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import (
    METHODS,
    TARGETS,
    AttributionError,
    Attributor,
    Entropy,
    FunctionTarget,
    IntegratedGradients,
    NotFiniteError,
    Rank,
    SmoothGradient,
    TopK,
    TrueLabel,
)

Pair = tuple[nn.Module, Tensor]


@pytest.mark.parametrize(
    "method", [IntegratedGradients(4, points="uniform"), SmoothGradient(3)], ids=lambda method: method.name
)
def test_each_of_several_targets_equals_the_same_target_alone(cnn: Pair, method) -> None:
    model, images = cnn
    model, images, labels = model.double(), images.double(), torch.tensor([1, 0, 5])
    targets = [TopK(1), Rank(2), TrueLabel(), Entropy()]
    settings = {"activations": True, "gradients": True}
    together = Attributor(model, ["blocks"], method, targets, **settings)(images, labels)
    assert [together.target, *together.others] == [target.name for target in targets]
    for target in targets:
        alone = Attributor(model, ["blocks"], method, target, **settings)(images, labels)
        found = together if target.name == together.target else together.others[target.name]
        torch.testing.assert_close(found.target_value, alone.target_value)
        torch.testing.assert_close(found.baseline_value, alone.baseline_value, equal_nan=True)
        for layer in alone:
            for name, values in alone[layer].quantities().items():
                torch.testing.assert_close(found[layer].quantities()[name], values)
            if alone[layer].completeness is not None:
                torch.testing.assert_close(found[layer].completeness, alone[layer].completeness)


def test_several_targets_share_the_forward_passes(cnn: Pair) -> None:
    model, images = cnn
    attributor = Attributor(
        model, ["blocks"], IntegratedGradients(5, points="uniform"), [Rank(rank) for rank in range(1, 6)], microbatch=3
    )
    attributor.probe(images)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    attributor(images)
    assert passes == [3] * 6


def test_the_same_target_twice_and_none_at_all_are_refused(cnn: Pair) -> None:
    model, _ = cnn
    with pytest.raises(AttributionError, match="top_1 is given twice"):
        Attributor(model, ["blocks"], target=[TopK(1), TopK(1)])
    with pytest.raises(AttributionError, match="no target is given"):
        Attributor(model, ["blocks"], target=[])


USERS_MODULE = """
import torch
from codec_dist.attribution import ActivationGradient, Target

def margin(output, first=0, second=1):
    return output[:, first] - output[:, second]

def loss(output, labels):
    return torch.nn.functional.cross_entropy(output, labels, reduction="none")

def wrong(output):
    return output.sum()

class Doubled(ActivationGradient):
    @property
    def name(self):
        return "doubled"

not_a_target = 3
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_targets.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_targets", raising=False)
    return "users_targets"


def test_a_target_by_import_path_takes_its_options_and_labels(cnn: Pair, users_module: str) -> None:
    model, images = cnn
    labels = torch.tensor([1, 0, 5])
    margin = TARGETS.build(f"{users_module}:margin", {"second": 3})
    loss = TARGETS.build(f"{users_module}:loss")
    assert margin.name == "users_targets.margin_second_3"
    result = Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"), [margin, loss])(images, labels)
    output = model.eval()(images)
    torch.testing.assert_close(result.target_value, (output[:, 0] - output[:, 3]).detach())
    expected = nn.functional.cross_entropy(output, labels, reduction="none")
    torch.testing.assert_close(result.others[loss.name].target_value, expected.detach())
    assert loss.needs_labels
    assert not margin.needs_labels
    with pytest.raises(AttributionError, match="come without labels"):
        Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"), loss)(images)
    with pytest.raises(AttributionError, match="sample 1 of the batch has no label"):
        Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"), loss)(images, torch.tensor([1, -1, 5]))


def test_a_method_by_import_path(cnn: Pair, users_module: str) -> None:
    model, images = cnn
    method = METHODS.build(f"{users_module}:Doubled", {"normalize": "gradient"})
    assert Attributor(model, ["blocks.0"], method)(images)["blocks.0"].positive.shape == (3, 8)


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("nowhere.at_all:margin", {}, "cannot import the target 'nowhere.at_all:margin'"),
        ("users_targets:margins", {}, "cannot import the target .*margins"),
        ("users_targets:not_a_target", {}, "is a int, not a function of the output"),
        ("users_targets:margin", {"third": 2}, "no option 'third'"),
        ("users_targets:loss", {"labels": 2}, "no option 'labels'"),
        ("margin", {}, "unknown target 'margin'.*or give an import path"),
    ],
)
def test_import_paths_that_lead_nowhere_are_refused(users_module: str, name: str, options: dict, cause: str) -> None:
    with pytest.raises(AttributionError, match=cause):
        TARGETS.build(name, options)


def test_a_target_that_is_not_one_number_per_sample_is_refused(cnn: Pair, users_module: str) -> None:
    model, images = cnn
    with pytest.raises(AttributionError, match=r"wrong returns \[\] for an output of \[\d, 6\]: one number per sample"):
        Attributor(model, ["blocks"], target=TARGETS.build(f"{users_module}:wrong"))(images)


def test_a_target_that_is_not_finite_is_named(cnn: Pair) -> None:
    model, images = cnn
    infinite = FunctionTarget(lambda output: output.sum(1) / 0, "ratio")
    with pytest.raises(NotFiniteError, match="sample 0 of the batch: the target ratio is not finite"):
        Attributor(model, ["blocks"], IntegratedGradients(1), [TopK(1), infinite])(images)


def test_a_target_that_needs_more_classes_than_there_are_is_refused(cnn: Pair) -> None:
    model, images = cnn
    for target, cause in ((TopK(7), "k is 7, the model has only 6"), (Rank(7), "rank is 7, the model has only 6")):
        with pytest.raises(AttributionError, match=cause):
            Attributor(model, ["blocks"], target=target)(images)
