"""What is worth logging of an SAE's evaluation, in plain numbers that can travel between ranks as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codec_dist.training.held_out_metrics import Evaluation
from codec_dist.training.sae_jobs import SaeJob


@dataclass(frozen=True)
class Note:
    """One evaluation of one SAE on held-out rows."""

    layer: str
    quantity: str
    architecture: str
    label: str
    """Its name in logs."""
    folder: str
    """Relative to the run's ``sae`` folder; unique."""
    epoch: int
    numbers: Mapping[str, float]
    """Scalars by name; undefined ones are left out."""
    histograms: Mapping[str, list[float]]
    """Per-mode values by name."""
    top_modes: list[list[Any]]
    """Mode, class, correlation, frequency and Hoyer of the modes that correlate most with a class."""

    @classmethod
    def of(cls, job: SaeJob, epoch: int, numbers: Mapping[str, float], evaluation: Evaluation) -> "Note":
        """``numbers``: those of the evaluation, and what training adds."""
        return cls(
            layer=job.layer,
            quantity=job.quantity,
            architecture=job.architecture,
            label=job.label,
            folder=job.folder.as_posix(),
            epoch=epoch,
            numbers=dict(numbers),
            histograms={name: values.tolist() for name, values in evaluation.histograms().items()},
            top_modes=evaluation.top_modes(),
        )
