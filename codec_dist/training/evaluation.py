"""Held-out metrics and mode statistics of SAEs, computed by all ranks and merged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from codec_dist.modes import Correlations, LoadingCorrelations
from codec_dist.sae import ReconstructionMetrics, ReconstructionReport, SparseAutoencoder
from codec_dist.statistics import hoyer
from codec_dist.training.ranks import Ranks
from codec_dist.training.rows import LayerRows

TOP_MODES = 10


@dataclass(frozen=True)
class Evaluation:
    """One SAE on one part of the split."""

    report: ReconstructionReport
    correlations: Correlations | None
    """Of loadings with classes; None without labels."""
    hoyer: Tensor
    """Hoyer sparsity of each dictionary row, NaN for a row of zeros."""

    def top_correlation(self) -> Tensor:
        """The highest correlation of each mode with a class; NaN where it has none."""
        if self.correlations is None:
            return torch.full_like(self.report.frequency, math.nan)
        known = self.correlations.correlation.nan_to_num(nan=-math.inf).amax(0)
        return known.masked_fill(known.isneginf(), math.nan)

    def numbers(self, threshold: float) -> dict[str, float]:
        """Scalars to log; a mode whose top correlation exceeds ``threshold`` is class-correlated."""
        frequency, top = self.report.frequency, self.top_correlation()
        numbers = {name: value for name, value in self.report.numbers().items() if name != "samples"}
        numbers["modes_alive"] = float((frequency > 0).sum())
        if self.correlations is not None:
            numbers["modes_class_correlated"] = float((top > threshold).sum())
            numbers["median_top_correlation"] = float(top.nanmedian())
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def histograms(self) -> dict[str, Tensor]:
        """Per-mode values by name, undefined ones left out."""
        alive = self.report.frequency > 0
        values = {
            "top_correlation": self.top_correlation(),
            "log10_frequency": self.report.frequency[alive].log10(),
            "hoyer": self.hoyer,
        }
        finite = {name: tensor[tensor.isfinite()] for name, tensor in values.items()}
        return {name: tensor for name, tensor in finite.items() if len(tensor)}

    def top_modes(self) -> list[list[Any]]:
        """Mode, class, correlation, frequency and Hoyer of the modes that correlate most with a class."""
        if self.correlations is None:
            return []
        top = self.top_correlation()
        defined = top.isfinite().nonzero()[:, 0]
        order = defined[top[defined].argsort(descending=True, stable=True)][:TOP_MODES].tolist()
        classes = self.correlations.correlation.nan_to_num(nan=-math.inf).argmax(0)
        frequency = self.report.frequency
        return [
            [mode, int(classes[mode]), float(top[mode]), float(frequency[mode]), float(self.hoyer[mode])]
            for mode in order
        ]


@torch.no_grad()
def evaluate(
    saes: Sequence[SparseAutoencoder], rows: Sequence[LayerRows], part: str, classes: int, ranks: Ranks
) -> list[Evaluation]:
    """Evaluate each SAE on its rows of ``part``; the same result on every rank."""
    mine = [_measure(sae, layer_rows, part, classes) for sae, layer_rows in zip(saes, rows, strict=True)]
    first, *others = ranks.gather(mine)
    for other in others:
        for (metrics, correlations), (more_metrics, more_correlations) in zip(first, other, strict=True):
            metrics.merge(more_metrics)
            correlations.merge(more_correlations)
    return [
        Evaluation(
            metrics.result(sae.dictionary.cpu()),
            correlations.result() if classes else None,
            hoyer(sae.dictionary.cpu().double()),
        )
        for sae, (metrics, correlations) in zip(saes, first, strict=True)
    ]


@torch.no_grad()
def mean_losses(saes: Sequence[SparseAutoencoder], rows: Sequence[LayerRows], part: str, ranks: Ranks) -> list[float]:
    """Mean loss of each SAE over its rows of ``part``, without dropout; the same on every rank."""
    sums = torch.zeros(len(saes) + 1, dtype=torch.float64, device=ranks.device)
    for number, (sae, layer_rows) in enumerate(zip(saes, rows, strict=True)):
        sae.eval()
        for values, _ in layer_rows.held_out(part):
            if len(values):
                sums[number] += sae.loss(values).total * len(values)
                sums[-1] += len(values) if number == 0 else 0
        sae.train()
    *totals, count = ranks.sum_(sums).tolist()
    return [total / count for total in totals]


def _measure(
    sae: SparseAutoencoder, rows: LayerRows, part: str, classes: int
) -> tuple[ReconstructionMetrics, LoadingCorrelations]:
    metrics, correlations = ReconstructionMetrics(), LoadingCorrelations(sae.modes, max(classes, 1))
    sae.eval()
    for values, labels in rows.held_out(part):
        loadings = sae.encode(values)
        metrics.update(values, sae.decode(loadings), loadings)
        correlations.update(loadings, labels)
    sae.train()
    return metrics, correlations
