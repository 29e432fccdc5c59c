"""How few classes a mode speaks of, and how well classes and modes are covered."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Specificity:
    """Concentration of each mode's positive correlations r⁺ on few classes; nan where no r⁺ > 0.

    All four grow with specificity and lie in [0, 1].
    """

    entropy: Float[Tensor, "modes"]
    """1 − H(r⁺/Σr⁺)/log n over the n classes with a correlation: 1 for one class, 0 for all alike; nan for n = 1."""
    gini: Float[Tensor, "modes"]
    """Gini coefficient of r⁺: 0 for all classes alike, 1 − 1/n for one class."""
    top1_mass: Float[Tensor, "modes"]
    """Share of the best class in Σr⁺."""
    top5_mass: Float[Tensor, "modes"]
    """Share of the best five classes in Σr⁺."""


@dataclass(frozen=True)
class Coverage:
    """Sorted correlations, averaged; undefined classes and modes are left out."""

    by_class: Float[Tensor, "defined_modes"]
    """At rank i, the mean over classes of each class's i-th highest correlation."""
    by_mode: Float[Tensor, "defined_classes"]
    """At rank i, the mean over modes of each mode's i-th highest correlation."""


def specificity(correlation: Float[Tensor, "classes modes"]) -> Specificity:
    """Specificity of each mode (METHOD §5) from correlations [classes, modes], nan where undefined."""
    rows = _defined(correlation)[0]
    positive = correlation[rows].double().clamp(min=0).sort(dim=0).values
    classes, modes = positive.shape
    if not classes:
        undefined = torch.full((modes,), torch.nan, dtype=torch.float64)
        return Specificity(undefined, undefined, undefined, undefined)
    share = positive / positive.sum(dim=0)
    entropy = torch.special.entr(share).sum(dim=0)
    rank = torch.arange(1, classes + 1, dtype=torch.float64)[:, None]
    return Specificity(
        entropy=1 - entropy / torch.tensor(float(classes), dtype=torch.float64).log(),
        gini=((2 * rank - classes - 1) * share).sum(dim=0) / classes,
        top1_mass=share[-1],
        top5_mass=share[-5:].sum(dim=0),
    )


def coverage(correlation: Float[Tensor, "classes modes"]) -> Coverage:
    """Coverage curves (METHOD §5) from correlations [classes, modes], nan where undefined."""
    rows, columns = _defined(correlation)
    defined = correlation[rows][:, columns].double()
    if not defined.numel():
        return Coverage(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    return Coverage(
        by_class=defined.sort(dim=1, descending=True).values.mean(dim=0),
        by_mode=defined.sort(dim=0, descending=True).values.mean(dim=1),
    )


def _defined(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and modes with any correlation: undefined is always a whole class or a whole mode."""
    known = ~correlation.isnan()
    return known.any(dim=1), known.any(dim=0)
