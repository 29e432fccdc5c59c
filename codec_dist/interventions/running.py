"""Right answers under many conditions: the model with its channels changed, its batches, and sums of its answers."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from codec_dist.attribution import Capture, borrowed, edited, find_cuts
from codec_dist.interventions.contexts import ChannelLayout
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import ABLATE, PRESERVE, Condition

# How far the output may differ when the layers before the changed one are shared; rounding stays far below.
SHARING_TOLERANCE = 1e-3


@dataclass(eq=False)
class InterventionCounts:
    """How many images, and how many answered rightly, per condition and class that it needs.

    Only needed pairs are held ("cells"): the classes of the first condition, then of the second, and so
    on, so that a hundred subjects with twenty random rankings of their own stay a few megabytes.
    """

    layer: str
    correct: Int[np.ndarray, "cells"]
    """Images whose highest logit is the label's."""
    total: Int[np.ndarray, "cells"]
    """Images evaluated."""

    @classmethod
    def empty(cls, layer: str, conditions: Sequence[Condition]) -> "InterventionCounts":
        """Counts of no image at all, ready to be merged into."""
        cells = int(cell_offsets(conditions)[-1])
        return cls(layer, np.zeros(cells, np.int64), np.zeros(cells, np.int64))

    def merge(self, other: "InterventionCounts") -> "InterventionCounts":
        """Add counts of other images under the same conditions; returns self.

        Raises:
            InterventionError: the two are of different layers or numbers of cells.
        """
        if self.layer != other.layer or self.correct.shape != other.correct.shape:
            raise InterventionError(
                f"counts of {self.layer} ({self.correct.size} cells) and of {other.layer} ({other.correct.size} cells) "
                "do not add up: count both under the same conditions"
            )
        # Not in place: arrays that come from another process may be read-only.
        self.correct = self.correct + other.correct
        self.total = self.total + other.total
        return self


def count_correct(
    model: nn.Module,
    layer: str,
    images: Float[Tensor, "batch ..."],
    labels: Int[Tensor, "batch"],
    conditions: Sequence[Condition],
    batch_size: int = 256,
) -> InterventionCounts:
    """Count right answers (highest logit = label) under every condition, for the classes that it needs.

    Each image runs only under the conditions that need its class, and once where several conditions change
    the same channels. At a cut layer the layers before it run once per image: its hook replaces the batch
    by (image, condition) pairs, each with its mask. At other layers the inputs are repeated.

    Args:
        model: any module whose output is [batch, classes]; left exactly as found.
        layer: layer key of one layer.
        images: normalised inputs; moved to the model's device and type batch by batch.
        labels: true classes; images whose class no condition needs, or with −1 (no label), are skipped.
        conditions: as in :attr:`Experiment.conditions`.
        batch_size: pairs (and images) that pass through the model at once.

    Raises:
        ModelError, AttributionError: the layer does not exist, or cannot be captured.
        InterventionError: conditions for another number of channels, a class that the model does not
            have, or an output of another form.
    """
    if batch_size < 1:
        raise InterventionError(f"a batch of {batch_size} pairs was asked for: choose at least 1")
    counts = InterventionCounts.empty(layer, conditions)
    groups = group_conditions(conditions)
    needed = torch.isin(labels.cpu(), torch.from_numpy(groups.classes))
    if not needed.any():
        return counts
    images, labels = images[needed.to(images.device)], labels.cpu()[needed]
    with borrowed(model):
        changed = ChangedModel(model, layer, groups, images)
        with torch.inference_mode():
            entries = sum(
                _count_batch(changed, part, wanted, groups, batch_size)
                for part, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True)
            )
    seen = np.bincount(np.searchsorted(groups.classes, labels.numpy()), minlength=len(groups.classes))
    counts.correct = entries.cpu().numpy()[groups.cell_entries]  # type: ignore[union-attr]
    counts.total = np.repeat(seen, groups.lengths)[groups.cell_entries]
    return counts


@dataclass(frozen=True, eq=False)
class Groups:
    """Conditions sorted for counting: an entry is a class with one of the different masks that it needs."""

    channels: int
    """Number of the layer's channels."""
    masks: UInt8[np.ndarray, "masks bytes"]
    """The different masks, eight channels to a byte (as ``numpy.packbits``); a bit is 1 where a channel stays."""
    classes: Int[np.ndarray, "classes"]
    """Classes needed, ascending; each owns a run of entries."""
    starts: Int[np.ndarray, "classes"]
    """First entry of each class."""
    lengths: Int[np.ndarray, "classes"]
    """Number of entries of each class."""
    entry_masks: Int[np.ndarray, "entries"]
    """Mask of each entry."""
    cell_entries: Int[np.ndarray, "cells"]
    """Entry of each cell of :class:`InterventionCounts`."""


class ChangedModel:
    """A borrowed model that answers for (image, mask) pairs of one batch of images at a time."""

    def __init__(self, model: nn.Module, layer: str, groups: Groups, images: Tensor) -> None:
        self._model, self._layer = model, layer
        self._layout = ChannelLayout(model, layer)
        self._parameter = next(model.parameters(), images)
        self._images = self._hidden = images[:0]
        self._channels = groups.channels
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self._parameter.device)
        first = self.prepared(images[:1])
        self._layout.learn(first)
        self._shared = self._is_cut(first)
        with torch.inference_mode():
            self._check(first, groups)
            self._shared = self._shared and self._can_share(self.prepared(images[[0, -1]]))

    def prepared(self, images: Tensor) -> Tensor:
        """On the model's device, in its type."""
        return images.to(self._parameter.device, self._parameter.dtype, non_blocking=True)

    @contextmanager
    def batch(self, images: Tensor) -> Iterator[None]:
        """While open, pairs are of these images."""
        self._images = images
        self._hidden = self._reach(images) if self._shared else images[:0]
        try:
            yield
        finally:
            self._images = self._hidden = images[:0]

    def __call__(self, rows: Int[Tensor, "pairs"], masks: Int[Tensor, "pairs"]) -> Float[Tensor, "pairs classes"]:
        """The model's output for images of the batch, each with the channels of one mask."""
        factors = self._factors(masks)
        if self._shared:
            return self._resume(self._images[:1], self._hidden, rows, factors)

        def edit(hidden: Tensor) -> Tensor:
            return hidden * self._layout.spread(factors, hidden, 1.0)

        with edited(self._model, {self._layout.key: edit}):
            return self._model(self._images.index_select(0, rows))

    def _factors(self, masks: Int[Tensor, "pairs"]) -> Float[Tensor, "pairs channels"]:
        """1 where a channel stays, 0 elsewhere. Unpacked when needed: as numbers, all masks could fill the memory."""
        bits = (self._packed.index_select(0, masks)[:, :, None] >> self._shifts) & 1
        return bits.flatten(1)[:, : self._channels].to(self._images.dtype)

    def _reach(self, images: Tensor) -> Tensor:
        """Run the model up to the layer."""

        def stop(hidden: Tensor) -> Tensor:
            raise _LayerReached(hidden)

        try:
            with edited(self._model, {self._layout.key: stop}):
                self._model(images)
        except _LayerReached as reached:
            return reached.hidden
        raise InterventionError(f"layer {self._layer} was not reached: the forward pass never calls its module")

    def _resume(self, image: Tensor, hidden: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        """Run the model on one image, with pairs of other images' hidden tensors and masks instead of its own."""

        def edit(current: Tensor) -> Tensor:
            selected = hidden.index_select(0, rows)
            return selected.mul_(self._layout.spread(factors, selected, 1.0))

        with edited(self._model, {self._layout.key: edit}):
            return self._model(image)

    def _is_cut(self, image: Tensor) -> bool:
        with torch.inference_mode(False), torch.enable_grad(), Capture(self._model, [self._layout.key]) as capture:
            return find_cuts(capture, image.clone())[self._layout.key.site]

    def _check(self, image: Tensor, groups: Groups) -> None:
        channels = self._layout.count(self._reach(image))
        if channels != groups.channels:
            raise InterventionError(
                f"conditions for {groups.channels} channels cannot be run at {self._layer}: it has {channels}"
            )
        outputs = self._model(image).shape[1]
        if groups.classes[-1] >= outputs or groups.classes[0] < 0:
            wrong = groups.classes[-1] if groups.classes[-1] >= outputs else groups.classes[0]
            raise InterventionError(f"a condition needs class {wrong}: the model has {outputs} classes, from 0")
        self._packed = torch.from_numpy(groups.masks).to(image.device)

    def _can_share(self, images: Tensor) -> bool:
        """Whether another batch size may begin at the layer: some models remember that of their input."""
        direct, hidden = self._model(images), self._reach(images)
        rows = torch.arange(len(images), device=images.device)
        try:
            resumed = self._resume(images[:1], hidden, rows, images.new_ones(2, self._channels))
        except (AssertionError, IndexError, RuntimeError, ValueError):
            return False
        limit = SHARING_TOLERANCE * direct.abs().max()
        return resumed.shape == direct.shape and bool(((resumed - direct).abs() <= limit).all())


def _count_batch(
    changed: ChangedModel, images: Tensor, labels: Tensor, groups: Groups, batch_size: int
) -> Int[Tensor, "entries"]:
    """Right answers of some images, per entry."""
    images = changed.prepared(images)
    columns = np.searchsorted(groups.classes, labels.numpy())
    lengths = groups.lengths[columns]
    # Pairs run through the first image's entries, then the second's, and so on.
    shifts = groups.starts[columns] - np.concatenate([[0], np.cumsum(lengths)[:-1]])
    pair_entries = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
    rows, entries, masks, labels = (
        torch.as_tensor(values).to(images.device)
        for values in (
            np.repeat(np.arange(len(labels)), lengths),
            pair_entries,
            groups.entry_masks[pair_entries],
            labels,
        )
    )
    correct = torch.zeros(len(groups.entry_masks), dtype=torch.int64, device=images.device)
    with changed.batch(images):
        for chunk in torch.arange(len(rows), device=images.device).split(batch_size):
            largest, answer = changed(rows[chunk], masks[chunk]).max(dim=1)
            # An answer that is not a number is wrong.
            right = (answer == labels[rows[chunk]]) & largest.isfinite()
            correct.index_add_(0, entries[chunk], right.long())
    return correct


class _LayerReached(Exception):  # noqa: N818 (it stops a forward pass; nothing went wrong)
    """Carries the hidden tensor out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


# ---- Conditions sorted so that no image runs twice under one mask, and none under a condition in vain


def group_conditions(conditions: Sequence[Condition]) -> Groups:
    """Find the different masks and, for each class, which of them it needs.

    Raises:
        InterventionError: no conditions, one without classes, or conditions of different layers' widths.
    """
    widths = {len(condition.order) for condition in conditions}
    if len(widths) != 1 or not all(condition.classes for condition in conditions):
        raise InterventionError(
            f"{len(conditions)} conditions for {sorted(widths)} channels: "
            "at least one, of one layer, each with a class, is needed"
        )
    masks, mask_of_condition = np.unique(_pack_masks(conditions), axis=0, return_inverse=True)
    cell_classes = np.concatenate([np.asarray(condition.classes, np.int64) for condition in conditions])
    cell_masks = np.repeat(mask_of_condition.reshape(-1), [len(condition.classes) for condition in conditions])
    entries, cell_entries = np.unique(cell_classes * len(masks) + cell_masks, return_inverse=True)
    classes, starts, lengths = np.unique(entries // len(masks), return_index=True, return_counts=True)
    return Groups(widths.pop(), masks, classes, starts, lengths, entries % len(masks), cell_entries.reshape(-1))


def _pack_masks(conditions: Sequence[Condition]) -> UInt8[np.ndarray, "conditions bytes"]:
    """Packed :meth:`Condition.keep` of all; those of one ranking, which follow each other, are made together."""
    packed = []
    for _, alike in itertools.groupby(conditions, key=lambda condition: id(condition.order)):
        group = list(alike)
        order = group[0].order
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        kept = place < np.array([condition.count for condition in group])[:, None]
        ablated, preserved = (
            np.array([condition.kind == kind for condition in group])[:, None] for kind in (ABLATE, PRESERVE)
        )
        packed.append(np.packbits(np.where(kept, ~ablated, ~preserved), axis=1))
    return np.concatenate(packed)


def cell_offsets(conditions: Sequence[Condition]) -> Int[np.ndarray, "conditions_and_end"]:
    """Where each condition's cells begin; the last entry is the number of cells."""
    return np.cumsum([0, *(len(condition.classes) for condition in conditions)])
