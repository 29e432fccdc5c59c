"""Names of stored quantities: ``contribution-positive``, ``contribution[top_5]-negative``, ``activation-net``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from codec_dist.store.errors import StoreError
from codec_dist.utils import escape_name, suggestion

KINDS = ("contribution", "activation", "gradient")
SIGNS = ("positive", "negative")
DERIVED = ("net", "both")
STORABLE = tuple(f"{kind}-{sign}" for kind in KINDS for sign in SIGNS)


@dataclass(frozen=True)
class Quantity:
    """One stored array per layer: a kind, the target that contributions explain, and a sign."""

    kind: str
    target: str | None
    """Target of a contribution; None for activations and gradients."""
    sign: str

    @property
    def path(self) -> str:
        """Folder of the array below its layer's folder."""
        target = [] if self.target is None else [escape_name(self.target)]
        return "/".join([self.kind, *target, self.sign])

    @property
    def full_name(self) -> str:
        """The name with its target spelled out, whichever target comes first."""
        target = "" if self.target is None else f"[{self.target}]"
        return f"{self.kind}{target}-{self.sign}"


def stored_quantities(quantities: Sequence[str], targets: Sequence[str]) -> dict[str, Quantity]:
    """Every array of a layer by name, in the order given; contributions of all targets but the first are bracketed.

    Raises:
        StoreError: an unknown or repeated quantity or target, or contributions without a target.
    """
    for name in quantities:
        if name not in STORABLE:
            raise StoreError(f"unknown quantity {name!r}: {suggestion(name, STORABLE)}")
    if not quantities or len(set(quantities)) < len(quantities) or len(set(targets)) < len(targets):
        raise StoreError(f"quantities {list(quantities)} and targets {list(targets)} must be given, each once")
    named: dict[str, Quantity] = {}
    for name in quantities:
        kind, sign = name.split("-")
        if kind != "contribution":
            named[name] = Quantity(kind, None, sign)
            continue
        if not targets:
            raise StoreError(f"the quantity {name!r} needs a target: name at least one")
        for number, target in enumerate(targets):
            quantity = Quantity(kind, target, sign)
            named[quantity.full_name if number else name] = quantity
    return named


def canonical_name(name: str, stored: dict[str, Quantity]) -> str:
    """``name``, with the brackets of a store's first target taken away."""
    if name in stored:
        return name
    match = re.fullmatch(r"(\w+)\[(.+)\]-(\w+)", name)
    plain = f"{match[1]}-{match[3]}" if match else ""
    first_target = match is not None and plain in stored and stored[plain].target == match[2]
    return plain if first_target else name


def terms_of(name: str, stored: dict[str, Quantity]) -> tuple[str, ...]:
    """The stored quantities that make the quantity ``name``: itself, or both signs.

    Of a ``-net`` they are summed, of a ``-both`` they lie side by side.

    Raises:
        StoreError: the store does not hold what is asked; the nearest names are given.
    """
    base, _, sign = name.rpartition("-")
    terms = [f"{base}-{each}" for each in SIGNS] if sign in DERIVED else [name]
    terms = [canonical_name(term, stored) for term in terms]
    if all(term in stored for term in terms):
        return tuple(terms)
    complete = [base for base in map(_base_of, stored) if all(f"{base}-{each}" in stored for each in SIGNS)]
    known = [*stored, *(f"{base}-{each}" for base in complete for each in DERIVED)]
    raise StoreError(f"the store holds no quantity {name!r}: {suggestion(name, set(known))}")


def _base_of(name: str) -> str:
    return name.rpartition("-")[0]
