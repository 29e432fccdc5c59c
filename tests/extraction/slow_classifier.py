"""The demo's classifier, with the slowness of a large one."""

import time

from torch import Tensor

from codec_dist.demo.classifier import DigitsClassifier

SECONDS_PER_PASS = 0.05


class SlowClassifier(DigitsClassifier):
    """Takes its time over every pass, in which other processes can compute."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(SECONDS_PER_PASS)
        return super().forward(images)


def slow_classifier() -> SlowClassifier:
    """The same numbers as those of ``digits_classifier``."""
    return SlowClassifier()
