"""Counts by reason, each with its first example: what was left out, changed or cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counts by reason; a fold of ``add`` and ``merge``."""

    counts: dict[str, int] = field(default_factory=dict)
    """Reason → how often."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason → the first example."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count ``count`` more of a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, example)

    def merge(self, other: "Tally") -> None:
        """Add the counts of another tally, whose examples come later."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> Iterator[str]:
        """One line per reason, the most frequent first."""
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            yield f"{count:,} {reason}, first {shown(self.first[reason])}"


def shown(name: str) -> str:
    r"""A file's name as it can be printed on one line: bytes that are not UTF-8 and control characters as ``\xNN``."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
