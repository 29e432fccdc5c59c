"""Targets are the formulas that they claim to be."""

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from codec_dist.attribution import (
    TARGETS,
    AttributionError,
    Contrast,
    Entropy,
    GivenClass,
    OutputSum,
    Target,
    TopK,
    TrueLabel,
)

OUTPUT = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, -1.0, 2.5]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
SOFTMAX = np.exp(OUTPUT.numpy()) / np.exp(OUTPUT.numpy()).sum(1, keepdims=True)


def value(target: Target, output: Tensor = OUTPUT) -> list[float]:
    return target.value(output, target.choose(OUTPUT, LABELS)).tolist()


@pytest.mark.parametrize(
    ("target", "expected", "name"),
    [
        (TopK(), [3.0, 4.0], "top_1"),
        (TopK(2), [4.0, 6.5], "top_2"),
        (TopK(2, probabilities=True), [SOFTMAX[0, [0, 3]].sum(), SOFTMAX[1, [1, 3]].sum()], "top_2_probability"),
        (TopK(1, frozen=True), [3.0, 4.0], "top_1_frozen"),
        (GivenClass(1), [-2.0, 4.0], "class_1"),
        (GivenClass(1, probabilities=True), SOFTMAX[:, 1].tolist(), "class_1_probability"),
        (TrueLabel(), [0.5, 0.0], "label"),
        (TrueLabel(probabilities=True), [SOFTMAX[0, 2], SOFTMAX[1, 0]], "label_probability"),
        (OutputSum(), [2.5, 5.5], "sum"),
        (Entropy(), (-SOFTMAX * np.log(SOFTMAX)).sum(1).tolist(), "entropy"),
        (Contrast(), [2.0, 1.5], "contrast"),
        (Contrast(probabilities=True), [SOFTMAX[0, 3] - SOFTMAX[0, 0], SOFTMAX[1, 1] - SOFTMAX[1, 3]], None),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_value_and_name(target: Target, expected: list[float], name: str | None) -> None:
    assert value(target) == pytest.approx(expected, rel=1e-12)
    assert target.name == (name or "contrast_probability")


def test_frozen_outputs_are_those_that_were_largest_at_the_image() -> None:
    elsewhere = -OUTPUT
    assert value(TopK(1, frozen=True), elsewhere) == [-3.0, -4.0]
    assert value(TopK(1), elsewhere) == [2.0, 1.0]


def test_the_config_reaches_every_target_by_name() -> None:
    assert set(TARGETS) == {"top_k", "class", "label", "rank", "sum", "entropy", "contrast", "surprisal"}
    assert TARGETS.build("top_k", {"k": 5}) == TopK(5)
    assert TARGETS.build("class", {"index": 3, "probabilities": True}) == GivenClass(3, probabilities=True)
    with pytest.raises(AttributionError, match="unknown target 'topk': did you mean top_k"):
        TARGETS.build("topk")
    with pytest.raises(AttributionError, match="the target 'class' needs the option 'index'"):
        TARGETS.build("class")


@pytest.mark.parametrize(("name", "options"), [("top_k", {"k": 1.5}), ("top_k", {"k": True}), ("class", {"index": -1})])
def test_a_config_with_odd_numbers_is_refused(
    name: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without type checks
    with pytest.raises(AttributionError, match="must be a whole number from"):
        TARGETS.build(name, options)


def test_targets_that_the_output_does_not_have_are_refused() -> None:
    with pytest.raises(AttributionError, match="k is 5, the model has only 4 outputs"):
        value(TopK(5))
    with pytest.raises(AttributionError, match="index 4 of a model with 4 outputs"):
        value(GivenClass(4))
    with pytest.raises(AttributionError, match="come without labels"):
        TrueLabel().choose(OUTPUT, None)
    with pytest.raises(AttributionError, match="sample 1 of the batch has no label"):
        TrueLabel().choose(OUTPUT, torch.tensor([0, -1]))
    with pytest.raises(AttributionError, match="sample 0 of the batch has the label 9, the model has 4 outputs"):
        TrueLabel().choose(OUTPUT, torch.tensor([9, 1]))
    with pytest.raises(AttributionError, match="a contrast needs two"):
        value(Contrast(), OUTPUT[:, :1])
