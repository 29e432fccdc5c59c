"""Training of the demo's classifier."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from codec_dist.demo.classifier import CLASSES, DigitsClassifier
from codec_dist.utils import derive_seed

EPOCHS = 12
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 1e-2
# A fixed number, so that the weights do not depend on the machine's cores.
THREADS = 1


def train_classifier(
    images: Float[Tensor, "samples 1 height width"],
    labels: Int[Tensor, " samples"],
    seed: int,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> DigitsClassifier:
    """Train the classifier from scratch with AdamW and a one-cycle rate.

    Half of each batch is shown at a random contrast α in [0, 1] with the target α · label + (1 − α) · uniform.
    So the mean-colour image says nothing about the class, and the path to it from any image passes through
    images that the network knows: what integrated gradients explain is then the image, not a whim at x₀.

    The same images, labels and seed give the same weights on the same kind of machine.

    Args:
        images: preprocessed images of the fit part.
        labels: their classes, 0 to 9.
        seed: decides initial weights and the order of batches.
        after_epoch: called with the epoch's number (from 1) and its mean cross-entropy in nats.

    Returns:
        The classifier in eval mode.
    """
    with torch.random.fork_rng(devices=[]), _threads(THREADS):
        torch.manual_seed(derive_seed(seed, "classifier", "weights"))
        classifier = DigitsClassifier().to(memory_format=torch.channels_last)
        order = torch.Generator().manual_seed(derive_seed(seed, "classifier", "order"))
        batches = len(images) // BATCH_SIZE
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * batches)
        for epoch in range(1, EPOCHS + 1):
            total = 0.0
            permutation = torch.randperm(len(images), generator=order)
            for rows in permutation[: batches * BATCH_SIZE].split(BATCH_SIZE):
                contrast = torch.rand(len(rows), generator=order)
                contrast[torch.rand(len(rows), generator=order) < 0.5] = 1
                targets = functional.one_hot(labels[rows], CLASSES) * contrast[:, None]
                targets += (1 - contrast[:, None]) / CLASSES
                loss = functional.cross_entropy(classifier(images[rows] * contrast[:, None, None, None]), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            after_epoch(epoch, total / batches)
    return classifier.to(memory_format=torch.contiguous_format).eval()


def accuracy(
    classifier: torch.nn.Module, images: Float[Tensor, "samples 1 height width"], labels: Int[Tensor, " samples"]
) -> float:
    """Fraction of images whose highest logit is their label's."""
    with torch.inference_mode(), _threads(THREADS):
        predictions = torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(256)])
    return float((predictions == labels).double().mean())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
