"""All files below a folder, links followed, each folder once; what is no part of a data set is counted."""

import os
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from codec_dist.shards.errors import ShardError
from codec_dist.shards.image_files import image_suffixes, suffix_of
from codec_dist.shards.streams import why_passed_over
from codec_dist.shards.tally import Tally, shown

HIDDEN = "in folders whose names begin with a dot, or __MACOSX"


class FolderTree(NamedTuple):
    """What a folder of images holds."""

    folders: list[str]
    """Names of the subfolders, sorted; those that were reached again through a link are left out."""
    images: list[str]
    """Relative paths of the images, by folder and name."""
    left_out: Tally
    """Everything else: files, and links to folders that were reached already."""


def read_folder_tree(root: Path) -> FolderTree:
    """Images (by suffix) below a folder.

    Links to files and folders are followed. A folder that can be reached several times (links to the same place, links
    to a folder above) belongs to where it lies, or, if it lies elsewhere, to the first link in the order of paths.

    Raises:
        ShardError: links to nowhere, or a folder that cannot be read.
    """
    walk = _Walk(root)
    walk.below("", root)
    while walk.links:
        walk.follow(heappop(walk.links)[1])
    if walk.dangling:
        path, target = walk.dangling[0], shown(os.readlink(root / walk.dangling[0]))
        raise ShardError(
            f"{len(walk.dangling):,} links in {root} lead nowhere, first {shown(path)} -> {target}: "
            "restore what they mean, or remove them"
        )
    return FolderTree(sorted(walk.folders), sorted(walk.images, key=_by_folder), walk.left_out)


class _Walk:
    """Real folders first, then links to folders one by one, so that a folder belongs to where it lies."""

    def __init__(self, root: Path) -> None:
        self._root, self._visited = root, {_identity(root)}
        self.folders: list[str] = []
        self.images: list[str] = []
        self.dangling: list[str] = []
        self.links: list[tuple[tuple[list[str], str], str]] = []
        """Heap of the links to folders that were not followed yet, by their paths."""
        self.left_out = Tally()

    def below(self, folder: str, path: Path) -> None:
        """Take in all that lies below a folder, without the links to folders."""
        for entry in _entries(path):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                self._enter(name, entry)
            elif reason := why_passed_over(entry.name):
                self.left_out.add(reason, name)
            elif _leads_nowhere(entry):
                self.dangling.append(name)
            elif not entry.is_file():
                self.left_out.add("devices, pipes and sockets", name)
            elif (suffix := suffix_of(entry.name)) not in image_suffixes():
                self.left_out.add(f"files .{suffix}, no format of images" if suffix else "files without suffix", name)
            else:
                self.images.append(name)

    def follow(self, name: str) -> None:
        """Take in what lies below a link to a folder, unless that was reached already."""
        path = self._root / name
        identity = _identity(path)
        if identity in self._visited:
            self.left_out.add("links to folders that are packed already", f"{name} -> {os.readlink(path)}")
            return
        self._visited.add(identity)
        self._add_folder(name)
        self.below(name, path)

    def _enter(self, name: str, entry: "os.DirEntry[str]") -> None:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            count = 1 if entry.is_symlink() else _count_below(entry.path)
            if count:
                self.left_out.add(f"files {HIDDEN}", name, count)
        elif entry.is_symlink():
            heappush(self.links, (_by_folder(name), name))
        elif (identity := _identity(Path(entry.path))) in self._visited:
            self.left_out.add("folders that are packed already by another path", name)
        else:
            self._visited.add(identity)
            self._add_folder(name)
            self.below(name, Path(entry.path))

    def _add_folder(self, name: str) -> None:
        if "/" not in name:
            self.folders.append(name)


def _count_below(folder: str) -> int:
    """Number of files and links."""
    return sum(
        len(files) + sum(os.path.islink(os.path.join(parent, each)) for each in folders)
        for parent, folders, files in os.walk(folder)
    )


def _by_folder(path: str) -> tuple[list[str], str]:
    *folders, name = path.split("/")
    return folders, name


def _entries(path: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ShardError(f"cannot read the folder {shown(str(path))}: {error.strerror}") from error


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _leads_nowhere(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_symlink() and not os.path.exists(entry.path)
    except OSError:
        return True
