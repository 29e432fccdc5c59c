"""Right answers per condition and class, as sums that workers build and a fold merges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import Condition


@dataclass(eq=False)
class InterventionCounts:
    """How many images, and how many answered rightly, per condition and class that it needs.

    Only needed pairs are held ("cells"): the classes of the first condition, then of the second, and so
    on, so that a hundred subjects with twenty random rankings of their own stay a few megabytes.
    """

    layer: str
    correct: Int[np.ndarray, "cells"]
    """Images whose highest logit is the label's."""
    total: Int[np.ndarray, "cells"]
    """Images evaluated."""

    @classmethod
    def empty(cls, layer: str, conditions: Sequence[Condition]) -> "InterventionCounts":
        """Counts of no image at all, ready to be merged into."""
        cells = int(cell_offsets(conditions)[-1])
        return cls(layer, np.zeros(cells, np.int64), np.zeros(cells, np.int64))

    def merge(self, other: "InterventionCounts") -> "InterventionCounts":
        """Add counts of other images under the same conditions; returns self.

        Raises:
            InterventionError: the two are of different layers or numbers of cells.
        """
        if self.layer != other.layer or self.correct.shape != other.correct.shape:
            raise InterventionError(
                f"counts of {self.layer} ({self.correct.size} cells) and of {other.layer} ({other.correct.size} cells) "
                "do not add up: count both under the same conditions"
            )
        # Not in place: arrays that come from another process may be read-only.
        self.correct = self.correct + other.correct
        self.total = self.total + other.total
        return self


def cell_offsets(conditions: Sequence[Condition]) -> Int[np.ndarray, "conditions_and_end"]:
    """Where each condition's cells begin; the last entry is the number of cells."""
    return np.cumsum([0, *(len(condition.classes) for condition in conditions)])
