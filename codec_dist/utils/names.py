"""Names: the nearest to a misspelt one, and names that are safe as file names."""

import difflib
from collections.abc import Iterable
from urllib.parse import quote, unquote


def nearest_names(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The candidates most like ``name``, best first; empty if none is at all alike."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """A half-sentence for an error message: the nearest names, or all of them where they are few."""
    known = sorted(candidates)
    near = nearest_names(name, known)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    if len(known) <= 12:
        return "known: " + ", ".join(known)
    return f"known: {', '.join(known[:12])} and {len(known) - 12} more"


def escape_name(name: str) -> str:
    """A reversible form of any text that is one safe file name (percent-encoding; dots stay)."""
    escaped = quote(name, safe="@=+,")
    # "." and ".." alone are folders, and a leading dot hides a file.
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


def unescape_name(escaped: str) -> str:
    """The inverse of :func:`escape_name`."""
    return unquote(escaped)
