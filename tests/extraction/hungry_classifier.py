"""The demo's classifier, with the appetite of a large one."""

import torch
from torch import Tensor

from codec_dist.demo.classifier import DigitsClassifier

# More than any allocator keeps for itself, so that every pass asks the operating system for it.
WORKSPACE_BYTES = 1 << 30


class HungryClassifier(DigitsClassifier):
    """Takes a workspace for every pass; it is never written to, and so costs addresses alone."""

    def forward(self, images: Tensor) -> Tensor:
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8)
        return super().forward(images)


def hungry_classifier() -> HungryClassifier:
    """The same numbers as those of ``digits_classifier``."""
    return HungryClassifier()
