"""Learning rates over time."""

import math
from dataclasses import dataclass
from typing import Literal

RELATIVE_IMPROVEMENT = 1e-4


def rate_factor(schedule: Literal["constant", "cosine", "plateau"], progress: float) -> float:
    """What the learning rate is multiplied by after a fraction ``progress`` of the training.

    The plateau's factor depends on losses instead: see :class:`Plateau`.
    """
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


@dataclass
class Plateau:
    """Halves a rate once a loss has not improved for more than ``patience`` epochs (the paper's schedule)."""

    patience: int
    factor: float = 1.0
    best: float = math.inf
    waited: int = 0

    def update(self, loss: float) -> None:
        """Take in the loss of one more epoch."""
        if loss < self.best * (1 - RELATIVE_IMPROVEMENT):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.factor, self.waited = self.factor / 2, 0
