"""Names: the nearest to a misspelt one, and names that are safe as file names."""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote, unquote

HASH_DIGITS = 10
MADE = re.compile(rf"-[0-9a-f]{{{HASH_DIGITS}}}\Z")


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


def identifier(text: str, longest: int = 128) -> str:
    """A name of ASCII letters, digits and ``-_.`` for any text, for what takes no others; different for each text.

    A text that is such a name already stays as it is, unless it ends like one that was made here: where anything
    had to be changed, a readable rest is followed by ``-`` and 10 digits of the text's hash.
    """
    if len(text) <= longest and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) and not re.search(MADE, text):
        return text
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    rest = re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-") or "name"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
    return f"{rest[: longest - HASH_DIGITS - 1].rstrip('-')}-{digest}"


def escape_name(name: str) -> str:
    """A reversible form of any text that is one safe file name (percent-encoding; dots stay)."""
    escaped = quote(name, safe="@=+,")
    # "." and ".." alone are folders, and a leading dot hides a file.
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


def unescape_name(escaped: str) -> str:
    """The inverse of :func:`escape_name`."""
    return unquote(escaped)
