"""Patterns for the names of shards: ``*``, ``?``, ``[a-f]``, and braces as in ``train-{000..012}.tar``."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice

from codec_dist.shards.errors import ShardError

WILDCARD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MOST_NAMES = 1_000_000
# Files of these names hold shards that cannot be read as they are: compressed, parts of one, or still being downloaded.
# Other files are called after a tar, too: its index, its checksum.
COMPRESSED = re.compile(
    r"\.(tar\.(gz|bz2?|xz|zst|zstd|lz4|lzma|lz|lzo|lrz|br|z|sz|7z|zip|rar|part(ial)?\d*|crdownload|\d{1,4}|a[a-z])"
    r"|tgz|tbz2?|tb2|tz2|txz|tpxz|tlz|tzst|tzo|taz)$",
    re.IGNORECASE,
)


class NamePattern:
    """Which file names in a folder are meant.

    Args:
        text: a file name with wildcards (as in a shell) or braces: ``{000..012}`` for numbers of equal width,
            ``{a,b}`` for alternatives.

    Raises:
        ShardError: braces that are not closed or nested, or that stand for too many names.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        rest = BRACES.sub("", text)
        if "{" in rest or "}" in rest:
            raise ShardError(f"the pattern {text} has nested or unclosed braces: write e.g. train-{{000..012}}.tar")
        expanded = list(islice(_expand(text), MOST_NAMES + 1))
        if len(expanded) > MOST_NAMES:
            raise ShardError(f"the braces of the pattern {text} stand for more than {MOST_NAMES:,} names")
        self.names = frozenset(each for each in expanded if not WILDCARD.search(each))
        """File names that are spelled out, without wildcards: all of these must exist."""
        self._globs = [each for each in expanded if each not in self.names]

    @property
    def is_exact(self) -> bool:
        """Whether all names are spelled out."""
        return not self._globs

    def matches(self, name: str) -> bool:
        """Whether a file name is meant; upper and lower case differ."""
        return name in self.names or any(fnmatchcase(name, each) for each in self._globs)


def is_pattern(name: str) -> bool:
    """Whether the last part of a path is a pattern for shards, or the name of one, rather than a folder's name."""
    return bool(WILDCARD.search(name) or BRACES.search(name)) or is_tar_name(name) or is_compressed_name(name)


def is_tar_name(name: str) -> bool:
    """Whether a file of this name is taken for a shard."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def is_compressed_name(name: str) -> bool:
    """Whether a file of this name is a compressed tar, or a part of one."""
    return bool(COMPRESSED.search(name)) and not name.startswith(".")


def _expand(text: str) -> Iterator[str]:
    match = BRACES.search(text)
    if match is None:
        yield text
        return
    for each in _alternatives(match[1]):
        yield from _expand(text[: match.start()] + each + text[match.end() :])


def _alternatives(inner: str) -> Iterator[str]:
    ends = RANGE.fullmatch(inner)
    if ends is None:
        yield from inner.split(",")
        return
    first, last = int(ends[1]), int(ends[2])
    width = max(len(ends[1]), len(ends[2])) if ends[1].startswith("0") or ends[2].startswith("0") else 0
    for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield f"{number:0{width}d}"
