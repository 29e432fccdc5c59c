"""When to end a training early."""

import math
from dataclasses import dataclass

RELATIVE_IMPROVEMENT = 1e-4


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
