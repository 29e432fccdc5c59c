"""One pass over the rows of a layer: correlations of modes and of raw channels, and the best images."""

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from codec_dist.modes.correlations import Correlations, LoadingCorrelations
from codec_dist.modes.errors import ModesError
from codec_dist.modes.top_images import TopImages, TopLoadings
from codec_dist.sae import SparseAutoencoder

PARTS = ("fit", "select", "evaluate")
SELECT, EVALUATE = PARTS.index("select"), PARTS.index("evaluate")
ROWS_AT_ONCE = 1024


class PartCorrelations:
    """Mergeable correlations on *select*, where top modes are chosen, and on *evaluate*, which is reported."""

    def __init__(self, modes: int, classes: int) -> None:
        self._select, self._evaluate = LoadingCorrelations(modes, classes), LoadingCorrelations(modes, classes)

    def update(
        self, loadings: Float[Tensor, "batch modes"], labels: Int[Tensor, "batch"], parts: Int[Tensor, "batch"]
    ) -> None:
        """Add samples; ``parts`` are indices into ``PARTS``."""
        for part, accumulator in ((SELECT, self._select), (EVALUATE, self._evaluate)):
            inside = parts == part
            accumulator.update(loadings[inside], labels[inside])

    def merge(self, other: "PartCorrelations") -> "PartCorrelations":
        """Add what ``other`` has seen; returns self."""
        self._select.merge(other._select)
        self._evaluate.merge(other._evaluate)
        return self

    def result(self) -> tuple[Correlations, Correlations]:
        """Correlations on *select* and on *evaluate*."""
        return self._select.result(), self._evaluate.result()


class LayerSummary:
    """Mergeable summary of one quantity of one layer: raw channels always, modes where there is an SAE.

    Args:
        channels: channels of the layer.
        modes: modes of its SAE; None where there is none.
        classes: number of classes; 0 where nothing is labelled.
        images: how many top images of each mode are kept.
    """

    def __init__(self, channels: int, modes: int | None, classes: int, images: int) -> None:
        self.channels = PartCorrelations(channels, classes)
        self.modes = None if modes is None else PartCorrelations(modes, classes)
        self._top_images = TopImages(modes or 0, images)

    def update(
        self,
        rows: Float[Tensor, "batch channels"],
        labels: Int[Tensor, "batch"],
        parts: Int8[Tensor, "batch"],
        samples: Int[Tensor, "batch"],
        sae: SparseAutoencoder | None = None,
    ) -> None:
        """Add rows in stored units; rows of *fit* are left out.

        Args:
            rows: values of the quantity.
            labels: class of each row; −1 where there is none.
            parts: index into ``PARTS`` of each row; −1 for rows in no part.
            samples: index of each row among all samples.
            sae: the SAE of this layer and quantity, the same in every call.

        Raises:
            ModesError: a label that is no class, other numbers of channels or modes, or an SAE that is
                missing or not expected.
            StatisticsError: a value that is nan or infinite.
        """
        if (sae is None) != (self.modes is None):
            raise ModesError("an SAE is given where none is expected, or missing where one is")
        wanted = (parts == SELECT) | (parts == EVALUATE)
        for start in range(0, int(wanted.sum()), ROWS_AT_ONCE):
            chosen = wanted.nonzero()[start : start + ROWS_AT_ONCE, 0]
            self._add(rows[chosen], labels[chosen], parts[chosen], samples[chosen], sae)

    def merge(self, other: "LayerSummary") -> "LayerSummary":
        """Add what ``other`` has seen; returns self.

        Raises:
            ModesError: the other has other numbers of channels, modes, classes or images.
        """
        if (self.modes is None) != (other.modes is None):
            raise ModesError("a summary with modes and one without cannot be merged")
        self._top_images.merge(other._top_images)
        self.channels.merge(other.channels)
        if self.modes is not None and other.modes is not None:
            self.modes.merge(other.modes)
        return self

    def top_images(self) -> TopLoadings:
        """The highest loadings on *evaluate*."""
        return self._top_images.result()

    def _add(self, rows: Tensor, labels: Tensor, parts: Tensor, samples: Tensor, sae: SparseAutoencoder | None) -> None:
        self.channels.update(rows, labels, parts)
        if sae is None or self.modes is None:
            return
        with torch.inference_mode():
            loadings = sae.encode(rows.to(sae.dictionary.dtype))
        self.modes.update(loadings, labels, parts)
        evaluate = parts == EVALUATE
        self._top_images.update(loadings[evaluate], samples[evaluate])


def part_codes(names: np.ndarray) -> Int8[Tensor, "samples"]:
    """Names of parts as indices into ``PARTS``; −1 for any other."""
    codes = np.full(len(names), -1, np.int8)
    for code, name in enumerate(PARTS):
        codes[names == name] = code
    return torch.from_numpy(codes)
