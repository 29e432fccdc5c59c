"""The demo's classifier, which some images kill: as a problem in a native library would."""

import os
import signal

from torch import Tensor

from codec_dist.demo.classifier import DigitsClassifier

# A white image has the value 1.84 everywhere; no digit and no baseline is so bright.
DEADLY = 1.8


class DeadlyClassifier(DigitsClassifier):
    """Ends its process at once where an image is white."""

    def forward(self, images: Tensor) -> Tensor:
        if (images.flatten(1) > DEADLY).all(dim=1).any():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().forward(images)


def deadly_classifier() -> DeadlyClassifier:
    """The same numbers as those of ``digits_classifier``."""
    return DeadlyClassifier()
