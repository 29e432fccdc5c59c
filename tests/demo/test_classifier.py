"""The demo's classifier learns the digits, and the same seed gives the same weights."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from codec_dist.demo.classifier import digits_classifier
from codec_dist.demo.training import accuracy, train_classifier


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(np.asarray(data.images) / 16, dtype=torch.float32)[:, None]
    return (functional.interpolate(images, size=16, mode="bilinear") - 0.3) / 0.38, torch.tensor(data.target)


def test_model_has_six_blocks_of_the_stated_widths() -> None:
    model = digits_classifier()
    hidden = model.stem(torch.zeros(2, 1, 16, 16))
    shapes = []
    for block in model.blocks:
        hidden = block(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2 + [(128, 4, 4)] * 2
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_same_seed_gives_the_same_weights_and_leaves_global_randomness_alone(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:128], digits[1][:128]
    state = torch.random.get_rng_state()
    threads = torch.get_num_threads()
    first = train_classifier(images, labels, seed=3).state_dict()
    second = train_classifier(images, labels, seed=3).state_dict()
    other = train_classifier(images, labels, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_classifier_reaches_97_percent_on_digits_it_has_not_seen(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    fit, rest = order[:1078], order[1078:]
    losses: list[float] = []
    classifier = train_classifier(images[fit], labels[fit], 0, lambda _, loss: losses.append(loss))
    assert accuracy(classifier, images[rest], labels[rest]) >= 0.97
    assert losses[-1] < losses[0]
    assert not classifier.training
