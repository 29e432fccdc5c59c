"""What the modes, or the raw channels, of one layer say about classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from codec_dist.modes.concepts import class_index, parse_concepts
from codec_dist.modes.correlations import Correlations
from codec_dist.modes.errors import ModesError
from codec_dist.modes.specificity import Coverage, Specificity, coverage, specificity
from codec_dist.utils import suggestion

MODE, CHANNEL = "mode", "channel"


@dataclass(frozen=True)
class TopMode:
    """A mode of a class: chosen by its correlation on *select*, judged by that on *evaluate*."""

    mode: int
    correlation_select: float
    correlation: float


@dataclass(frozen=True)
class TopClass:
    """A class of a mode, with their correlation on *evaluate*."""

    index: int
    name: str
    correlation: float


@dataclass(frozen=True, eq=False)
class LayerModes:
    """The modes of one SAE (unit ``mode``), or the channels themselves (unit ``channel``), against classes.

    Top modes of a class are chosen on *select*; every other number is from *evaluate*.
    """

    layer: str
    quantity: str
    unit: str
    select: Correlations
    evaluate: Correlations
    threshold: float
    """Correlation above which a mode counts as class-correlated."""
    class_names: tuple[str, ...]
    hoyer: Float[Tensor, "modes"] | None = None
    """Hoyer sparsity of each dictionary row; None for channels."""
    stability: Float[Tensor, "modes"] | None = None
    """Mean cosine with the modes matched in SAEs of other seeds, nan for dead modes; None for channels and one seed."""
    concepts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Named sets of classes."""
    top_images: pa.Table | None = None
    """mode, rank, shard, key, label, loading of the samples of *evaluate* that load highest; None for channels."""

    def __len__(self) -> int:
        return self.correlation.shape[1]

    @property
    def correlation(self) -> Float[Tensor, "classes modes"]:
        """Pearson correlation on *evaluate*; nan where undefined."""
        return self.evaluate.correlation

    @property
    def alive(self) -> Bool[Tensor, "modes"]:
        """Modes that fire at least once on *evaluate*."""
        return self.evaluate.frequency > 0

    def top_correlations(self) -> Float[Tensor, "modes"]:
        """Each mode's highest signed correlation with any class; nan where it has none."""
        return highest(self.correlation.T)[1]

    def class_correlated(self) -> Bool[Tensor, "modes"]:
        """Modes whose correlation with some class exceeds the threshold."""
        return (self.correlation > self.threshold).any(dim=0)

    def specificity(self) -> Specificity:
        """How few classes each mode speaks of."""
        return specificity(self.correlation)

    def coverage(self) -> Coverage:
        """Sorted correlations averaged per class and per mode."""
        return coverage(self.correlation)

    def top_modes(self, target: int | str, count: int = 5) -> list[TopMode]:
        """The modes that correlate most with a class (index or name) on *select*, best first.

        Raises:
            ModesError: no such class, or a name that several classes have.
        """
        index = self._class_index(target)
        return _top_modes(self.select.correlation[index], self.correlation[index], count)

    def top_modes_of_concept(self, concept: str, count: int = 5) -> list[TopMode]:
        """The modes that correlate most with a concept on *select*, best first.

        Raises:
            ModesError: no such concept.
        """
        if concept not in self.concepts:
            raise ModesError(f"unknown concept {concept!r}: {suggestion(concept, self.concepts)}")
        select, evaluate = self.concept_correlations({concept: self.concepts[concept]})
        return _top_modes(select[0], evaluate[0], count)

    def concept_correlations(
        self, concepts: Mapping[str, Sequence[int | str]] | None = None
    ) -> tuple[Float[Tensor, "concepts modes"], Float[Tensor, "concepts modes"]]:
        """Correlations with concepts on *select* and on *evaluate*; by default with those of the summary.

        Raises:
            ModesError: a concept lists an unknown class.
        """
        known = self.concepts if concepts is None else parse_concepts(concepts, self.class_names)
        groups = list(known.values())
        return self.select.of_groups(groups), self.evaluate.of_groups(groups)

    def top_classes(self, mode: int, count: int = 5) -> list[TopClass]:
        """The classes that correlate most with a mode, best first.

        Raises:
            ModesError: no such mode.
        """
        self._check_mode(mode)
        column = self.correlation[:, mode]
        order = _descending(column)[:count]
        return [TopClass(index, self.class_names[index], float(column[index])) for index in order]

    def images(self, mode: int) -> list[dict[str, object]]:
        """The samples that load highest on a mode, best first: rank, shard, key, label, loading.

        Raises:
            ModesError: no such mode.
        """
        self._check_mode(mode)
        if self.top_images is None:
            return []
        chosen = self.top_images.filter(pc.equal(self.top_images["mode"], mode))
        rows: list[dict[str, object]] = chosen.drop_columns("mode").sort_by("rank").to_pylist()
        return rows

    def _class_index(self, target: int | str) -> int:
        index = class_index(target, self.class_names) if isinstance(target, str) else target
        if not 0 <= index < len(self.class_names):
            raise ModesError(f"there is no class {index}: classes are numbered from 0 to {len(self.class_names) - 1}")
        return index

    def _check_mode(self, mode: int) -> None:
        if not 0 <= mode < len(self):
            raise ModesError(f"{self.layer} has no {self.unit} {mode}: they are numbered from 0 to {len(self) - 1}")


def highest(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Float[Tensor, "rows"]]:
    """Column and value of the highest entry of each row, leaving nan out; −1 and nan where a row has no other."""
    known = ~rows.isnan()
    if not rows.shape[1]:
        return torch.full((len(rows),), -1), torch.full((len(rows),), torch.nan, dtype=torch.float64)
    value, column = rows.masked_fill(~known, -torch.inf).max(dim=1)
    some = known.any(dim=1)
    return column.masked_fill(~some, -1), value.masked_fill(~some, torch.nan)


def _descending(values: Tensor) -> list[int]:
    """Indices of the defined values, highest first, equal ones by index."""
    defined = (~values.isnan()).nonzero()[:, 0]
    order: list[int] = defined[values[defined].argsort(descending=True, stable=True)].tolist()
    return order


def _top_modes(select: Tensor, evaluate: Tensor, count: int) -> list[TopMode]:
    order = _descending(select)[:count]
    return [TopMode(mode, float(select[mode]), float(evaluate[mode])) for mode in order]
