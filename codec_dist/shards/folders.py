"""Images to pack from folders: one subfolder per class."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from codec_dist.shards.class_lists import ClassList, match_classes, ordered_names
from codec_dist.shards.errors import ShardError
from codec_dist.shards.folder_tree import FolderTree, read_folder_tree
from codec_dist.shards.image_files import PACKED_AS_THEY_ARE, NoImageError, as_member, image_suffixes, suffix_of
from codec_dist.shards.samples import Sample, file_key
from codec_dist.shards.tally import Tally, shown


def image_folder(path: str | Path, classes: ClassList | None = None) -> tuple["ImageFiles", list[str]]:
    """Images of a folder whose subfolders are the classes, and the names of the classes.

    Images are told by their suffix: that of any format that Pillow decodes by itself. JPEG, PNG and WebP are packed
    byte by byte, others as PNG of the same pixels (of animations the first picture). Folders inside a class belong to
    it. A folder that holds images and no subfolders is unlabelled and has no classes. What is left out, and why, is
    counted in ``left_out`` of the source.

    Labels are numbers of the subfolders in the order of their names (of their numbers, where all are numbers), or,
    with ``classes``, the places of their names in that list.

    Keys are paths without suffix, encoded by :func:`file_key`; the suffix is kept where two files differ in it alone.

    Raises:
        ShardError: no such folder, images beside the class folders, a class without images, a link to nowhere, or
            a folder that is none of ``classes``.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ShardError(f"cannot read images from {root}: there is no such folder")
    tree = read_folder_tree(root, image_suffixes(), "format of images")
    folders = _class_folders(root, tree)
    if not folders:
        notes = [] if classes is None else ["there are no class folders, so that no image has a label"]
        return ImageFiles(root, [(image, None) for image in tree.files], tree.left_out, notes), []
    if classes is None:
        names, notes = ordered_names(folders, "folder")
        labels = {name: number for number, name in enumerate(names)}
    else:
        names, (labels, notes) = list(classes.names), match_classes(folders, classes, "folder")
    images = [(image, labels[image.partition("/")[0]]) for image in tree.files]
    return ImageFiles(root, images, tree.left_out, notes), [shown(name) for name in names]


class ImageFiles:
    """Files below a folder, by their relative paths; each is read when it is asked for."""

    def __init__(
        self, root: Path, images: Sequence[tuple[str, int | None]], left_out: Tally, notes: Sequence[str] = ()
    ) -> None:
        self._root, self._images = root, images
        self._whole_names = _told_apart_by_suffix([path for path, _ in images])
        self.left_out, self.changed, self.notes = left_out, Tally(), list(notes)

    def __len__(self) -> int:
        """Number of files; some may turn out to be no images when they are read."""
        return len(self._images)

    def __iter__(self) -> Iterator[Sample]:
        return self.read(range(len(self)))

    def keys(self) -> Iterator[str]:
        return (self._key(path) for path, _ in self._images)

    def read(self, numbers: Iterable[int]) -> Iterator[Sample]:
        """The images of these numbers; what cannot be packed is left out and counted."""
        for number in numbers:
            path, label = self._images[number]
            content, extension = (self._root / path).read_bytes(), suffix_of(path)
            if extension not in PACKED_AS_THEY_ARE:
                try:
                    content, extension, change = as_member(content)
                except NoImageError as error:
                    self.left_out.add(str(error), path)
                    continue
                if change:
                    self.changed.add(change, path)
            yield Sample(self._key(path), content, extension, label)

    def _key(self, path: str) -> str:
        return file_key(path if path in self._whole_names else os.path.splitext(path)[0])


def _class_folders(root: Path, tree: FolderTree) -> list[str]:
    """The subfolders that are classes; none if the folder is unlabelled."""
    held = {image.partition("/")[0] for image in tree.files if "/" in image}
    loose = [image for image in tree.files if "/" not in image]
    if tree.folders and loose:
        first = shown(loose[0])
        raise ShardError(f"{root} holds {len(loose):,} images beside class folders, first {first}: move them into one")
    found = f" (left out: {next(tree.left_out.lines())})" if tree.left_out.total else ""
    if empty := [name for name in tree.folders if name not in held]:
        raise ShardError(f"the class folder {root / shown(empty[0])} holds no images: fill or remove it")
    if not tree.files:
        raise ShardError(f"{root} holds no images and no class folders{found}")
    return [name for name in tree.folders if name in held]


def _told_apart_by_suffix(paths: Sequence[str]) -> frozenset[str]:
    """Files whose keys must keep the suffix, as another file of their folder would have the same key without it."""
    whole: set[str] = set()
    for _, group in groupby(paths, key=lambda path: path.rpartition("/")[0]):
        files = list(group)
        while True:
            stems = Counter(path if path in whole else os.path.splitext(path)[0] for path in files)
            clashing = {path for path in files if path not in whole and stems[os.path.splitext(path)[0]] > 1}
            if not clashing:
                break
            whole |= clashing
    return frozenset(whole)
