"""Counts of many conditions at once, against one forward pass per condition and class."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from codec_dist.interventions import (
    Condition,
    InterventionCounts,
    InterventionError,
    ablate,
    choose_off_targets,
    count_correct,
    layer_results,
    plan_experiment,
    preserve,
)
from codec_dist.interventions.running import group_conditions

CLASSES = 4


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        out = self.norm(self.conv(images))
        out += images
        return self.relu(out)


class Residual(nn.Module):
    """A small residual network in which a block is a cut layer and a convolution within one is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc1 = nn.Linear(8, 6)
        self.fc2 = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.blocks(self.stem(images)).mean(dim=(2, 3))).relu())


class Remembering(Residual):
    """Also cut by its blocks, but it remembers the batch size of its input."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.blocks(self.stem(images))
        pooled = hidden.view(len(images), 8, -1).mean(dim=2)
        return self.fc2(self.fc1(pooled).relu())


class Counter(nn.Module):
    """Counts the rows that pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.rows, self.calls = module, 0, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows, self.calls = self.rows + len(inputs), self.calls + 1
        return self.module(inputs)


def make(kind: type[Residual] = Residual) -> Residual:
    torch.manual_seed(0)
    model = kind().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    # Logits of one mean and spread, so that every class is answered and conditions change answers.
    with torch.no_grad():
        logits = model(torch.randn(200, 1, 6, 6, dtype=torch.float64) * 2)
        model.fc2.weight /= logits.std(dim=0)[:, None]
        model.fc2.bias.sub_(logits.mean(dim=0)).div_(logits.std(dim=0))
    return model


def make_data(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    # Half of the labels are what the model says, the others anything, or none.
    labels[::2] = torch.randint(-1, CLASSES, (len(labels[::2]),), generator=torch.Generator().manual_seed(3))
    return images, labels


def make_plan(layer: str, channels: int):
    generator = np.random.default_rng(4)
    modes = {
        name: dict(enumerate(generator.normal(size=(CLASSES, channels)))) for name in ("contribution-positive", "other")
    }
    modes["other"][1] = modes["other"][0]  # two classes may share a mode
    off_targets = choose_off_targets(range(CLASSES), 1, 0)
    return plan_experiment(layer, channels, modes, off_targets=off_targets, percentages=(5, 50), random_draws=1)


def naive_counts(model: nn.Module, layer: str, images: Tensor, labels: Tensor, conditions) -> list[tuple[int, int]]:
    """Right answers and images of each (condition, class), by one forward pass each."""
    cells = []
    for condition in conditions:
        context = preserve if condition.kind == "preserve" else ablate
        chosen = [] if condition.kind == "intact" else condition.channels.tolist()
        for label in condition.classes:
            mine = images[labels == label]
            with torch.no_grad(), context(model, layer, chosen):
                right = int((model(mine).argmax(dim=1) == label).sum()) if len(mine) else 0
            cells.append((right, len(mine)))
    return cells


LAYERS = {"blocks.0": 8, "blocks.1.conv": 8, "fc1": 6, "fc2@input": 6, "stem": 8, "blocks.1.relu@input": 8}


@pytest.mark.parametrize("layer", LAYERS)
def test_counts_equal_one_pass_per_condition_and_class(layer: str) -> None:
    model = make()
    images, labels = make_data(model)
    plan = make_plan(layer, LAYERS[layer])
    expected = naive_counts(model, layer, images, labels, plan.conditions)
    for batch_size in (17, 1000):
        counts = count_correct(model, layer, images, labels, plan.conditions, batch_size)
        assert list(zip(counts.correct.tolist(), counts.total.tolist())) == expected
    # The conditions do change answers, so the comparison says something.
    assert len({right / total for right, total in expected if total}) > 3


def test_model_that_remembers_its_batch_size_is_counted_right() -> None:
    model = make(Remembering)
    images, labels = make_data(model)
    plan = make_plan("blocks.1", 8)
    counts = count_correct(model, "blocks.1", images, labels, plan.conditions, 16)
    expected = naive_counts(model, "blocks.1", images, labels, plan.conditions)
    assert list(zip(counts.correct.tolist(), counts.total.tolist())) == expected


def test_layers_before_a_cut_run_once_per_image_and_equal_masks_run_once() -> None:
    model = make()
    images, labels = make_data(model)
    plan = make_plan("blocks.1", 8)
    before, after = Counter(model.blocks[0]), Counter(model.fc1)
    model.blocks[0], model.fc1 = before, after
    images, labels = images[labels >= 0], labels[labels >= 0]
    count_correct(model, "blocks.1", images, labels, plan.conditions, 32)
    groups = group_conditions(plan.conditions)
    different = {
        label: len({c.keep().tobytes() for c in plan.conditions if label in c.classes}) for label in range(CLASSES)
    }
    pairs = sum(different[int(label)] for label in labels)
    assert dict(zip(groups.classes.tolist(), groups.lengths.tolist())) == different
    cells = sum(len(condition.classes) for condition in plan.conditions)
    assert len(groups.entry_masks) < cells
    # One pass of one image carries each batch of pairs; finding the cut takes a handful of images more.
    batches = -(-pairs // 32) + len(images) // 32 + 1
    assert pairs <= after.rows <= pairs + 10
    assert before.rows <= len(images) + batches + 10
    assert after.calls <= batches + 5


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_shards_add_up_to_the_whole(assignment: list[int]) -> None:
    model = make()
    images, labels = make_data(model, 24)
    plan = make_plan("blocks.1", 8)
    whole = count_correct(model, "blocks.1", images, labels, plan.conditions)
    merged = InterventionCounts.empty("blocks.1", plan.conditions)
    for shard in range(4):
        mine = torch.tensor(assignment) == shard
        merged.merge(count_correct(model, "blocks.1", images[mine], labels[mine], plan.conditions))
    assert (merged.correct == whole.correct).all()
    assert (merged.total == whole.total).all()


def test_images_that_no_condition_needs_are_not_run() -> None:
    model = make()
    images, labels = make_data(model)
    condition = Condition("mode", 0, 1, "ablate", 2, np.arange(8), (1, 3))
    model.stem = Counter(model.stem)
    counts = count_correct(model, "stem", images, torch.full_like(labels, 2), [condition])
    assert (counts.total.tolist(), counts.correct.tolist(), model.stem.calls) == ([0, 0], [0, 0], 0)
    counts = count_correct(model, "stem", images, labels, [condition])
    assert counts.total.tolist() == [int((labels == 1).sum()), int((labels == 3).sum())]


def test_answers_that_are_not_numbers_are_wrong() -> None:
    model = make()
    images, labels = make_data(model)
    model.fc2.bias.data[:] = torch.nan
    plan = make_plan("blocks.0", 8)
    counts = count_correct(model, "blocks.0", images, labels, plan.conditions)
    assert not counts.correct.any()
    with pytest.raises(InterventionError, match="answers none rightly"):
        layer_results(counts, plan)


def test_model_is_as_found_and_work_is_small_to_send() -> None:
    model = make().train()
    weights = copy.deepcopy(model.state_dict())
    images, labels = make_data(make())
    plan = pickle.loads(pickle.dumps(make_plan("blocks.0", 8)))  # noqa: S301
    counts = count_correct(model, "blocks.0", images, labels, plan.conditions)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected = count_correct(model.eval(), "blocks.0", images, labels, plan.conditions)
    assert (counts.correct == expected.correct).all()
    assert len(pickle.dumps(counts)) < 16 * len(counts.correct) + 1000


def test_what_does_not_fit_is_refused() -> None:
    model = make()
    images, labels = make_data(model)
    plan = make_plan("blocks.0", 8)
    with pytest.raises(InterventionError, match="conditions for 8 channels cannot be run at fc1: it has 6"):
        count_correct(model, "fc1", images, labels, plan.conditions)
    bad = Condition("mode", 0, 1, "ablate", 2, np.arange(8), (1, 9))
    with pytest.raises(InterventionError, match="class 9"):
        count_correct(model, "blocks.0", images, labels, [bad])
    with pytest.raises(InterventionError, match="at least one"):
        count_correct(model, "blocks.0", images, labels, [])
    with pytest.raises(InterventionError, match="batch of 0"):
        count_correct(model, "blocks.0", images, labels, plan.conditions, 0)
