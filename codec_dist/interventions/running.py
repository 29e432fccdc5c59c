"""Right answers under many conditions, each image under those that need its class."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution import borrowed
from codec_dist.interventions.changed_model import ChangedModel
from codec_dist.interventions.counts import InterventionCounts
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.grouping import Groups, group_conditions
from codec_dist.interventions.planning import Condition


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
