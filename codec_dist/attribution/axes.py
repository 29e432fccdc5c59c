"""What the axes of a tensor stand for, and how that carries over to tensors that are computed from it.

An axis is a product of :class:`Atom` objects: flattening height and width gives an axis of two, and an axis of size
1 has none. Two facts are known of an atom: its :class:`Kind`, shared with all axes that hold the same thing elsewhere
in the network (evidence for channels or positions), and, where learned tokens were joined to those of the image, the
runs of tokens along it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import NamedTuple

Origin = str | frozenset[str]
"""What tokens are: ``IMAGE``, ``UNKNOWN``, or the names of the parameters that they begin as."""

IMAGE, UNKNOWN = "image", "unknown"


class Run(NamedTuple):
    """So many consecutive tokens of one origin."""

    length: int
    origin: Origin


class Kind:
    """Evidence for what an axis holds; axes that are found to hold the same thing share it (union-find)."""

    def __init__(self, *evidence: str) -> None:
        self._parent: Kind | None = None
        self._evidence = set(evidence)

    def root(self) -> "Kind":
        node = self
        while node._parent is not None:
            node = node._parent
        return node

    def join(self, other: "Kind") -> None:
        """From now on the two are one."""
        own, others = self.root(), other.root()
        if own is not others:
            others._parent = own
            own._evidence |= others._evidence

    def mark(self, evidence: str) -> None:
        self.root()._evidence.add(evidence)

    @property
    def evidence(self) -> set[str]:
        return self.root()._evidence


@dataclass(frozen=True, eq=False)
class Atom:
    """A factor of an axis; ``runs`` is None where all its tokens have the origin of the tensor."""

    size: int
    kind: Kind = field(default_factory=Kind)
    runs: tuple[Run, ...] | None = None

    def forgotten(self) -> "Atom":
        """The same without knowledge of which tokens are where."""
        return self if self.runs is None else replace(self, runs=(Run(self.size, UNKNOWN),))


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Meaning:
    """What is known of a tensor.

    Attributes:
        axes: of each dimension.
        varied: whether the values depend on the image.
        origin: of the tokens that the tensor holds, where no axis has runs.
    """

    axes: tuple[Axis, ...]
    varied: bool
    origin: Origin

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(atom.size for atom in axis) for axis in self.axes)

    @property
    def divided(self) -> bool:
        """Whether some axis has runs of tokens."""
        return any(atom.runs is not None for axis in self.axes for atom in axis)

    def with_axes(self, axes: Iterable[Axis]) -> "Meaning":
        return replace(self, axes=tuple(axes))

    def runs(self, axis: int) -> tuple[Run, ...]:
        """The tokens along one axis."""
        atoms = self.axes[axis]
        if len(atoms) == 1 and atoms[0].runs is not None:
            return atoms[0].runs
        lost = any(atom.runs is not None for atom in atoms)
        return (Run(self.shape[axis], UNKNOWN if lost else self.origin),)


def fresh(shape: Sequence[int], varied: bool, origin: Origin, *, lost: bool = False) -> Meaning:
    """A tensor of whose axes nothing is known; ``lost``: nor of the tokens along them."""
    axes = (new_axis(size, Run(size, UNKNOWN) if lost else None) for size in shape)
    return Meaning(tuple(axes), varied, origin)


def new_axis(size: int, run: Run | None = None, *evidence: str) -> Axis:
    return () if size == 1 else (Atom(size, Kind(*evidence), None if run is None else (Run(size, run.origin),)),)


def mark(axis: Axis, evidence: str) -> None:
    """Note evidence for an axis whose atoms hold one thing; of flattened features nothing is said."""
    if axis and len({atom.kind.root() for atom in axis}) == 1:
        axis[0].kind.mark(evidence)


def viewed(value: Meaning, shape: Sequence[int]) -> Meaning:
    """The same numbers in the same order with another shape: axes are merged and split."""
    remaining, axes = [atom for axis in value.axes for atom in axis], []
    for size in shape:
        atoms: list[Atom] = []
        while (missing := size // prod(atom.size for atom in atoms)) > 1:
            atom = remaining.pop(0) if remaining else Atom(1)
            if missing % atom.size == 0 and atom.size > 1:
                atoms.append(atom)
            elif atom.size > 1 and atom.size % missing == 0:
                parts = [replace(atom.forgotten(), size=each) for each in (missing, atom.size // missing)]
                atoms.append(parts[0].forgotten())
                remaining.insert(0, parts[1].forgotten())
            else:
                return fresh(shape, value.varied, value.origin, lost=value.divided)
        axes.append(tuple(atoms))
    return value.with_axes(axes)


def selected(value: Meaning, dimension: int, start: int, length: int, *, step: int = 1) -> Meaning:
    """Some consecutive entries (or every ``step``-th) along one dimension, which keeps its place."""
    axis = value.axes[dimension]
    runs = value.runs(dimension)
    tokens = [run.origin for run in runs for _ in range(run.length)][start :: max(step, 1)][:length]
    found = tuple(Run(len(list(group)), origin) for origin, group in groupby(tokens))
    known = any(atom.runs is not None for atom in axis)
    kind = axis[0].kind if axis and len({atom.kind.root() for atom in axis}) == 1 else Kind()
    single = known and len(found) == 1
    atoms = () if length == 1 else (Atom(length, kind, found if known and not single else None),)
    axes = [atoms if place == dimension else each for place, each in enumerate(value.axes)]
    return replace(value, axes=tuple(axes), origin=found[0].origin if single else value.origin)


def joined(values: Sequence[Meaning], dimension: int) -> Meaning:
    """Tensors one after another along one dimension."""
    runs: list[Run] = []
    for value in values:
        for run in value.runs(dimension):
            if runs and runs[-1].origin == run.origin:
                run = Run(runs.pop().length + run.length, run.origin)
            runs.append(run)
    kinds = [atom.kind for value in values for atom in value.axes[dimension][:1] if len(value.axes[dimension]) == 1]
    for kind in kinds[1:]:
        kinds[0].join(kind)
    size = sum(run.length for run in runs)
    atoms = () if size == 1 else (Atom(size, kinds[0] if kinds else Kind(), tuple(runs) if len(runs) > 1 else None),)
    others = combined([value.with_axes(_without(value.axes, dimension)) for value in values], keep_all=True)
    axes = [*others.axes[:dimension], atoms, *others.axes[dimension:]]
    return Meaning(tuple(axes), others.varied, runs[0].origin if len(runs) == 1 else others.origin)


def padded(value: Meaning, dimension: int, before: int, after: int) -> Meaning:
    """Constants before and behind the entries along one dimension."""
    ends = [Run(length, frozenset()) for length in (before, after)]
    runs = tuple(run for run in (ends[0], *value.runs(dimension), ends[1]) if run.length)
    axis = value.axes[dimension]
    kind = axis[0].kind if len(axis) == 1 else Kind()
    atom = Atom(before + after + value.shape[dimension], kind, runs)
    return value.with_axes((*value.axes[:dimension], (atom,), *value.axes[dimension + 1 :]))


def _without(axes: Sequence[Axis], dimension: int) -> tuple[Axis, ...]:
    return (*axes[:dimension], *axes[dimension + 1 :])


def combined(values: Sequence[Meaning], *, keep_all: bool = False) -> Meaning:
    """What comes of computing with several tensors element by element, with broadcasting.

    The numbers that depend on the image decide what the tokens are, so that a position embedding changes nothing;
    a branch in whose computation tokens were lost (``UNKNOWN``) does not decide against one that knows them.
    ``keep_all``: the tensors stand beside each other, none is changed by the others.
    """
    varied = any(value.varied for value in values)
    deciding = [value for value in values if value.varied or not varied or keep_all]
    dimensions = max((len(value.axes) for value in values), default=0)
    axes: list[Axis] = []
    for back in range(dimensions, 0, -1):
        present = [value.axes[-back] for value in values if len(value.axes) >= back and value.axes[-back]]
        first = [value.axes[-back] for value in deciding if len(value.axes) >= back and value.axes[-back]]
        _join_axes(present)
        axes.append(_best([*first, *present], len(first)))
    return Meaning(tuple(axes), varied, _common_origin(deciding, varied))


def _join_axes(axes: Sequence[Axis]) -> None:
    for axis in axes[1:]:
        if [atom.size for atom in axis] == [atom.size for atom in axes[0]]:
            for own, other in zip(axes[0], axis, strict=True):
                own.kind.join(other.kind)
        elif all(len({atom.kind.root() for atom in each}) == 1 for each in (axes[0], axis)):
            axes[0][0].kind.join(axis[0].kind)


def _best(axes: Sequence[Axis], deciding: int) -> Axis:
    """Of axes that were combined, the one to go on with: the first ones decide which tokens are where."""
    if not axes:
        return ()
    if not deciding:
        return axes[0]
    known = {axis[0].runs for axis in axes[:deciding] if len(axis) == 1 and axis[0].runs is not None}
    certain = {runs for runs in known if all(run.origin != UNKNOWN for run in runs)}
    if not known:
        return axes[0]
    atom = next(axis[0] for axis in axes[:deciding] if len(axis) == 1 and axis[0].runs is not None)
    runs = certain.pop() if len(certain) == 1 else (Run(atom.size, UNKNOWN),)
    return (replace(atom, runs=runs),)


def _common_origin(values: Sequence[Meaning], varied: bool) -> Origin:
    largest = max((prod(value.shape[1:]) for value in values), default=0)
    origins = {value.origin for value in values if prod(value.shape[1:]) == largest or not varied} - {UNKNOWN}
    if len(origins) == 1:
        return origins.pop()
    if not varied:
        names = (origin for origin in origins if isinstance(origin, frozenset))
        return frozenset().union(*names)
    return UNKNOWN
