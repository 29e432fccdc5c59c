"""Learning rates over time, and when to end a training early."""

import math
from dataclasses import dataclass
from typing import Literal

RELATIVE_IMPROVEMENT = 1e-4


def rate_factor(schedule: Literal["constant", "cosine", "plateau"], progress: float, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by after a fraction ``progress`` of the training.

    During the fraction ``warmup`` it rises linearly from 0 to what the schedule says there. The plateau's own
    factor depends on losses instead: see :class:`Plateau`.
    """
    factor = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0
    return factor * progress / warmup if progress < warmup else factor


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


# ---- When to end a training early


@dataclass
class EarlyStop:
    """Counts the epochs since a loss last improved, by at least a ten-thousandth of itself."""

    patience: int | None
    """Epochs without improvement after which to stop; None: never."""
    best: float = math.inf
    waited: int = 0

    @property
    def due(self) -> bool:
        """Whether to stop now."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, loss: float) -> None:
        """Take in the loss of one more epoch."""
        if loss < self.best * (1 - RELATIVE_IMPROVEMENT):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
