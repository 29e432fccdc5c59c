"""All files below a folder, links followed, each folder once; what is no part of a data set is counted."""

import os
from collections.abc import Callable, Collection
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from codec_dist.shards.errors import ShardError
from codec_dist.shards.image_files import suffix_of
from codec_dist.shards.tally import Tally, shown
from codec_dist.shards.tar import why_passed_over


class FolderTree(NamedTuple):
    """What a folder of images, or of other files, holds."""

    folders: list[str]
    """Names of the subfolders, sorted; those that were reached again through a link are left out."""
    files: list[str]
    """Relative paths of the files of the suffixes that were requested for, by folder and name."""
    left_out: Tally
    """Everything else: files, and links to folders that were reached already."""


def read_folder_tree(root: Path, suffixes: Collection[str], what: str) -> FolderTree:
    """All files of some suffixes below a folder.

    Links to files and folders are followed. A folder that can be reached several times (links to the same place, links
    to a folder above) belongs to where it lies, or, if it lies elsewhere, to the first link in the order of paths.

    Args:
        root: the folder.
        suffixes: in lower case, without dot.
        what: what a file of another suffix is not, e.g. ``format of images``.

    Raises:
        ShardError: links to nowhere, or a folder that cannot be read.
    """
    walk = _Walk(root, suffixes, what)
    walk.below("", root)
    while walk.links:
        walk.follow(heappop(walk.links)[1])
    if walk.dangling:
        path = min(walk.dangling)
        raise ShardError(
            f"{len(walk.dangling):,} links in {root} lead nowhere, first {shown(path)} -> "
            f"{shown(os.readlink(root / path))}: restore their targets, or remove the links"
        )
    return FolderTree(sorted(walk.folders), walk.files(), walk.left_out)


class _Walk:
    """Real folders first, then links to folders one by one, so that a folder belongs to where it lies."""

    def __init__(self, root: Path, suffixes: Collection[str], what: str) -> None:
        self._root, self._suffixes, self._what = root, suffixes, what
        self._visited = {_identity(root)}
        self._names: dict[str, list[str]] = {}
        self.folders: list[str] = []
        self.dangling: list[str] = []
        self.links: list[tuple[list[str], str]] = []
        """Heap of the links to folders that were not followed yet, by their paths."""
        self.left_out = Tally()

    def files(self) -> list[str]:
        """Paths of the files found so far, by folder and name."""
        return [
            f"{folder}/{name}" if folder else name
            for folder in sorted(self._names, key=lambda folder: folder.split("/"))
            for name in self._names[folder]
        ]

    def below(self, folder: str, path: Path) -> None:
        """Take in all that lies below a folder, without the links to folders."""
        todo = [(folder, path)]
        while todo:
            folder, path = todo.pop()
            prefix = f"{folder}/" if folder else ""
            subfolders, names, others = _sorted_entries(path, self._suffixes)
            self._names[folder] = names
            for entry in others:
                self._leave_out(f"{prefix}{entry.name}", entry)
            todo += [
                (f"{prefix}{entry.name}", Path(entry.path))
                for entry in subfolders
                if self._enters(f"{prefix}{entry.name}", entry)
            ]

    def follow(self, name: str) -> None:
        """Take in what lies below a link to a folder, unless that was reached already."""
        path = self._root / name
        if self._is_new(name, path):
            self.below(name, path)
        else:
            self.left_out.add("links to folders that are packed already", f"{name} -> {os.readlink(path)}")

    def _leave_out(self, name: str, entry: "os.DirEntry[str]") -> None:
        if reason := why_passed_over(entry.name):
            self.left_out.add(reason, name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            self.dangling.append(name)
        elif not entry.is_file():
            self.left_out.add("devices, pipes and sockets", name)
        else:
            suffix = suffix_of(entry.name)
            self.left_out.add(f"files .{shown(suffix)}, no {self._what}" if suffix else "files without suffix", name)

    def _enters(self, name: str, entry: "os.DirEntry[str]") -> bool:
        """Whether what lies in a subfolder is to be taken in now."""
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            if count := 1 if entry.is_symlink() else _count_below(entry.path):
                self.left_out.add("files in folders whose names begin with a dot, or __MACOSX", name, count)
            return False
        if entry.is_symlink():
            heappush(self.links, (name.split("/"), name))
            return False
        if not self._is_new(name, Path(entry.path)):
            self.left_out.add("folders that are packed already by another path", name)
            return False
        return True

    def _is_new(self, name: str, path: Path) -> bool:
        identity = _identity(path)
        if identity in self._visited:
            return False
        self._visited.add(identity)
        if "/" not in name:
            self.folders.append(name)
        return True


def _sorted_entries(
    path: Path, suffixes: Collection[str]
) -> tuple[list["os.DirEntry[str]"], list[str], list["os.DirEntry[str]"]]:
    """Subfolders, names of files of the suffixes, and what else a folder holds; each by name."""
    subfolders, names, others = [], [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if _holds(entry.is_dir):
                    subfolders.append(entry)
                elif suffix_of(entry.name) in suffixes and not why_passed_over(entry.name) and _holds(entry.is_file):
                    names.append(entry.name)
                else:
                    others.append(entry)
    except OSError as error:
        raise ShardError(f"cannot read the folder {shown(str(path))}: {error.strerror}") from error
    return sorted(subfolders, key=_name), sorted(names), sorted(others, key=_name)


def _name(entry: "os.DirEntry[str]") -> str:
    return entry.name


def _count_below(folder: str) -> int:
    """Number of files and links."""
    return sum(
        len(files) + sum(os.path.islink(os.path.join(parent, each)) for each in folders)
        for parent, folders, files in os.walk(folder)
    )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _holds(question: Callable[[], bool]) -> bool:
    """The answer; no for links in a circle and links to what may not be looked at."""
    try:
        return question()
    except OSError:
        return False
