"""Many conditions sorted so that no image runs twice under one mask, and none under a condition in vain."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.planning import ABLATE, PRESERVE, Condition


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
        chosen = place < np.array([condition.count for condition in group])[:, None]
        ablated, preserved = (
            np.array([condition.kind == kind for condition in group])[:, None] for kind in (ABLATE, PRESERVE)
        )
        packed.append(np.packbits(np.where(chosen, ~ablated, ~preserved), axis=1))
    return np.concatenate(packed)
