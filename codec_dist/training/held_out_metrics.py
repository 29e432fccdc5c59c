"""Held-out metrics and mode statistics of SAEs, computed by all ranks and merged."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.modes import Correlations, LoadingCorrelations
from codec_dist.sae import Joined, ReconstructionMetrics, ReconstructionReport, SparseAutoencoder, TrainedAutoencoder
from codec_dist.statistics import hoyer
from codec_dist.training.collectives import Ranks
from codec_dist.training.optimizer import Unit
from codec_dist.training.rows import LayerRows

TOP_MODES = 10
# Loadings that are held at once (512 MB in float32).
MOST_LOADINGS = 1 << 27


@dataclass(frozen=True)
class Evaluation:
    """One SAE on one part of the split."""

    report: ReconstructionReport
    labelled: bool
    """Whether there are classes to correlate with."""
    top_class: Int[Tensor, "modes"]
    """The class with which each mode's loadings correlate most."""
    top_correlation: Float[Tensor, "modes"]
    """That correlation; NaN where a mode has none."""
    hoyer: Float[Tensor, "modes"]
    """Hoyer sparsity of each dictionary row, NaN for a row of zeros."""
    silent: Float[Tensor, "modes"] | None = None
    """Training samples since each mode fired; None for an SAE that is fitted."""

    @classmethod
    def of(
        cls,
        report: ReconstructionReport,
        dictionary: Tensor,
        correlations: Correlations | None,
        silent: Tensor | None = None,
    ) -> "Evaluation":
        """From the metrics, the dictionary, the correlations of loadings with classes, and counts of training."""
        sparsity = hoyer(dictionary.double())
        if correlations is None:
            unknown = torch.full_like(report.frequency, math.nan)
            return cls(report, False, torch.zeros(len(unknown), dtype=torch.int64), unknown, sparsity, silent)
        known, classes = correlations.correlation.nan_to_num(nan=-math.inf).max(0)
        return cls(report, True, classes, known.masked_fill(known.isneginf(), math.nan), sparsity, silent)

    def numbers(self, threshold: float) -> dict[str, float]:
        """Scalars to log; a mode whose top correlation exceeds ``threshold`` is class-correlated."""
        frequency, top = self.report.frequency, self.top_correlation
        numbers = {name: value for name, value in self.report.numbers().items() if name != "samples"}
        numbers["modes_alive"] = float((frequency > 0).sum())
        if self.labelled:
            numbers["modes_class_correlated"] = float((top > threshold).sum())
            numbers["median_top_correlation"] = float(top.nanmedian())
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def histograms(self) -> dict[str, Tensor]:
        """Per-mode values by name, undefined ones left out."""
        alive = self.report.frequency > 0
        values = {
            "top_correlation": self.top_correlation,
            "log10_frequency": self.report.frequency[alive].log10(),
            "hoyer": self.hoyer,
        }
        if self.silent is not None:
            values["log10_samples_since_fired"] = self.silent.log1p() / math.log(10)
        finite = {name: tensor[tensor.isfinite()] for name, tensor in values.items()}
        return {name: tensor for name, tensor in finite.items() if len(tensor)}

    def top_modes(self) -> list[list[Any]]:
        """Mode, class, correlation, frequency and Hoyer of the modes that correlate most with a class."""
        top = self.top_correlation
        defined = top.isfinite().nonzero()[:, 0]
        order = defined[top[defined].argsort(descending=True, stable=True)][:TOP_MODES].tolist()
        frequency = self.report.frequency
        return [
            [mode, int(self.top_class[mode]), float(top[mode]), float(frequency[mode]), float(self.hoyer[mode])]
            for mode in order
        ]


@torch.no_grad()
def evaluate(
    saes: Sequence[SparseAutoencoder],
    rows: Sequence[LayerRows],
    part: str,
    classes: int,
    ranks: Ranks,
    coders: Sequence[SparseAutoencoder | Joined] | None = None,
) -> list[Evaluation]:
    """Evaluate each SAE on its rows of ``part``; the same result on every rank.

    Rows that are not in memory are read once for all SAEs.

    Args:
        saes: whole ones.
        rows: of each.
        part: ``select`` or ``evaluate``.
        classes: number of classes to correlate with; 0: there are no labels.
        ranks: those that share the rows.
        coders: what encodes and decodes for each, on the device of the rows; default: the SAEs themselves.
    """
    coders = saes if coders is None else coders
    # What correlations are made of is as large as classes times modes, so it is held for few SAEs if possible.
    if len(saes) > 1 and all(layer_rows.resident for layer_rows in rows):
        triples = zip(saes, rows, coders, strict=True)
        return [
            found
            for sae, layer_rows, coder in triples
            for found in evaluate([sae], [layer_rows], part, classes, ranks, [coder])
        ]
    own = [(ReconstructionMetrics(), LoadingCorrelations(sae.modes, max(classes, 1))) for sae in saes]
    with _in_eval_mode([*saes, *coders]):
        for numbers, values, labels in _pieces(rows, part):
            for number in numbers:
                coder, at_once = coders[number], max(1, MOST_LOADINGS // saes[number].modes)
                for some, batch_labels in zip(values.split(at_once), labels.split(at_once), strict=True):
                    loadings = coder.encode(some)
                    own[number][0].update(some, coder.decode(loadings), loadings)
                    own[number][1].update(loadings, batch_labels)
    first, *others = ranks.gather(own)
    for other in others:
        for (metrics, correlations), (more_metrics, more_correlations) in zip(first, other, strict=True):
            metrics.merge(more_metrics)
            correlations.merge(more_correlations)
    found = []
    for sae, (metrics, correlations) in zip(saes, first, strict=True):
        silent = sae.samples_since_fired.double().cpu() if isinstance(sae, TrainedAutoencoder) else None
        with_classes = correlations.result() if classes else None
        # Where the SAE is: coherence compares all modes with each other.
        report = metrics.result(sae.dictionary)
        found.append(Evaluation.of(report, sae.dictionary.cpu(), with_classes, silent))
    return found


@torch.no_grad()
def mean_losses(units: Sequence[Unit], rows: Sequence[LayerRows], part: str, ranks: Ranks) -> list[float]:
    """Mean loss of each SAE over its rows of ``part``, without dropout; the same on every rank.

    ``rows`` are those of each unit; the result is by the numbers of SAEs.
    """
    numbers = torch.tensor([number for unit in units for number in unit.numbers])
    sums = [torch.zeros(len(unit.numbers), dtype=torch.float64, device=ranks.device) for unit in units]
    count = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    with _in_eval_mode([unit.module for unit in units]):
        for places, values, _ in _pieces(rows, part):
            if not len(values):
                continue
            for place in places:
                sums[place] += units[place].losses(values) * len(values)
                count += len(values) if place == 0 else 0
    *totals, all_rows = ranks.sum_(torch.cat([*sums, count])).tolist()
    by_number = torch.empty(len(numbers), dtype=torch.float64)
    by_number[numbers] = torch.tensor(totals, dtype=torch.float64)
    return [total / all_rows for total in by_number.tolist()]


def _pieces(rows: Sequence[LayerRows], part: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Held-out rows and labels, piece by piece, with the places in ``rows`` of those that they belong to."""
    for source in dict.fromkeys(rows):
        places = [place for place, layer_rows in enumerate(rows) if layer_rows is source]
        for values, labels in source.held_out(part):
            yield places, values, labels


@contextmanager
def _in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)
