"""What the modes, or the raw channels, of one layer say about classes and concepts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from codec_dist.modes.errors import ModesError
from codec_dist.modes.layer_summary import Correlations
from codec_dist.utils import read_json, suggestion

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
        """How few classes each mode correlates with."""
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
        selected = self.top_images.filter(pc.equal(self.top_images["mode"], mode))
        rows: list[dict[str, object]] = selected.drop_columns("mode").sort_by("rank").to_pylist()
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


# ---- How few classes a mode correlates with, and how well classes and modes are covered


def specificity(correlation: Float[Tensor, "classes modes"]) -> Specificity:
    """Specificity of each mode (docs/method.md §5) from correlations [classes, modes], nan where undefined."""
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
    """Coverage curves (docs/method.md §5) from correlations [classes, modes], nan where undefined."""
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


# ---- Concepts: named sets of classes, such as WordNet superclasses


def load_concepts(path: Path, class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read a JSON file ``{concept: [class names or indices]}``; see :func:`parse_concepts`.

    Raises:
        ModesError: no such file, no JSON, or a class that does not exist.
    """
    try:
        value = read_json(Path(path))
    except FileNotFoundError as error:
        raise ModesError(f"there is no concepts file {path}: set modes.concepts to a JSON file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModesError(f"the concepts file {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(members, list) for members in value.values()):
        raise ModesError(f"the concepts file {path} must hold {{concept: [class names or indices]}}")
    return parse_concepts(value, class_names)


def parse_concepts(concepts: Mapping[str, Sequence[Any]], class_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Concepts as ascending class indices, each class once (docs/method.md §5).

    Of the members, as read from JSON, a text is a class name and a number a class index.

    Raises:
        ModesError: an unknown class (with the nearest names), a name that several classes have, or a
            concept without classes.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(class_names):
        numbers.setdefault(name, []).append(number)
    return {name: _members(name, members, numbers, len(class_names)) for name, members in concepts.items()}


def class_index(name: str, class_names: Sequence[str]) -> int:
    """The index of the one class of this name.

    Raises:
        ModesError: no class has it (with the nearest names), or several have.
    """
    return _only(name, [number for number, each in enumerate(class_names) if each == name], class_names)


def _members(concept: str, members: Sequence[Any], numbers: Mapping[str, list[int]], classes: int) -> tuple[int, ...]:
    if not members:
        raise ModesError(f"the concept {concept!r} lists no class: give it some or remove it")
    return tuple(sorted({_member(concept, member, numbers, classes) for member in members}))


def _member(concept: str, member: Any, numbers: Mapping[str, list[int]], classes: int) -> int:
    if isinstance(member, str):
        return _only(member, numbers.get(member, []), numbers, f"the concept {concept!r} lists the ")
    if not isinstance(member, int) or isinstance(member, bool) or not 0 <= member < classes:
        raise ModesError(
            f"the concept {concept!r} lists {member!r}: classes are names, or numbers from 0 to {classes - 1}"
        )
    return member


def _only(name: str, found: Sequence[int], names: Iterable[str], where: str = "") -> int:
    if not found:
        raise ModesError(f"{where}unknown class {name!r}: {suggestion(name, names)}")
    if len(found) > 1:
        indices = f"{', '.join(map(str, found[:-1]))} and {found[-1]}"
        raise ModesError(f"{where}ambiguous class {name!r}: classes {indices} have this name; give the number instead")
    return found[0]
