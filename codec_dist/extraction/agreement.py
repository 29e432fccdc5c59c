"""How well predictions agree with labels, and what a lack of agreement looks like: counts that add up over shards."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Pairs of label and prediction are counted for so many images; labels and right answers for all.
PAIRED_IMAGES = 100_000
# Fewer labelled images say nothing.
FEWEST_IMAGES = 5
# A label's images that say where predictions of it go.
FEWEST_PER_LABEL = 3
# Answers this much above chance are a model's own, however rare they are: as a fraction of what chance leaves.
ABOVE_CHANCE = 0.05

PREPARED = "model.preprocessing"
REPACK = "pack the shards with the model's classes"


@dataclass
class Agreement:
    """Labels and predictions of some images, counted."""

    labelled: int = 0
    """Images that have a label."""
    right: int = 0
    """Those of them whose prediction is their label."""
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (label, prediction)."""
    paired: int = 0
    """Images in ``pairs``."""

    @classmethod
    def of(cls, samples: pa.Table) -> "Agreement":
        """Count a table with the columns ``label`` (null: none) and ``prediction``."""
        known = samples.select(["label", "prediction"]).filter(pc.is_valid(samples["label"]))
        columns = [known[name].to_numpy().astype(np.int64) for name in ("label", "prediction")]
        found, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
        pairs = Counter({(int(label), int(answer)): int(n) for (label, answer), n in zip(found, counts, strict=True)})
        return cls(len(known), int((columns[0] == columns[1]).sum()), pairs, len(known))

    def merge(self, other: "Agreement") -> None:
        """Add the counts of other images."""
        self.labelled += other.labelled
        self.right += other.right
        if self.paired < PAIRED_IMAGES:
            self.pairs.update(other.pairs)
            self.paired += other.paired

    @property
    def accuracy(self) -> float | None:
        """Fraction of the labelled images whose prediction is their label; None without any."""
        return self.right / self.labelled if self.labelled else None

    @property
    def labels(self) -> Counter[int]:
        """Images by label."""
        return _sums((label, count) for (label, _), count in self.pairs.items())

    @property
    def predictions(self) -> Counter[int]:
        """Labelled images by prediction."""
        return _sums((answer, count) for (_, answer), count in self.pairs.items())

    @property
    def chance(self) -> float:
        """Accuracy to expect if the same predictions had nothing to do with the same labels."""
        answers = self.predictions
        return sum(count * answers[label] for label, count in self.labels.items()) / max(self.paired, 1) ** 2

    @property
    def near_chance(self) -> bool:
        """Whether the accuracy is no better than chance, beyond what so few images can tell."""
        if self.labelled < FEWEST_IMAGES:
            return False
        if len(self.labels) == 1:
            return self.right == 0
        chance = self.chance
        spread = 3 * math.sqrt(chance * (1 - chance) / self.labelled)
        return self.right / self.labelled <= chance + max(spread, ABOVE_CHANCE * (1 - chance))

    def moved(self) -> dict[int, int]:
        """Labels whose images are mostly given one other prediction, and that, if most images are of such labels.

        Empty where predictions are right, scattered, or the same for all labels.
        """
        answers: dict[int, Counter[int]] = {}
        for (label, answer), count in self.pairs.items():
            answers.setdefault(label, Counter())[answer] += count
        found, images = dict[int, int](), 0
        for label, counts in answers.items():
            answer, most = counts.most_common(1)[0]
            if answer != label and counts.total() >= FEWEST_PER_LABEL and 2 * most > counts.total():
                found[label] = answer
                images += counts.total()
        distinct = len(set(found.values()))
        return found if len(found) >= 2 and 2 * images > self.paired and distinct >= 0.8 * len(found) else {}


@dataclass(frozen=True)
class Expectation:
    """What is known of labels and predictions before any is seen."""

    outputs: int | None
    """Outputs of the model, None where they are not one per class."""
    classes: int | None
    """Classes of the data, by their names or all their labels; None where that is not known."""
    random_weights: bool
    """The model's weights are random by request."""


NOTHING_EXPECTED = Expectation(outputs=None, classes=None, random_weights=False)


def warnings_of(agreement: Agreement, expected: Expectation) -> dict[str, str]:
    """What speaks against the labels, the weights or the preprocessing, by kind; empty where all looks right."""
    if agreement.labelled < FEWEST_IMAGES:
        return {}
    found = {}
    cause = _cause(agreement, expected)
    if cause is not None:
        said = f"predictions agree with labels in {agreement.right:,} of {agreement.labelled:,} images"
        found["agreement"] = f"{said}: {cause}"
    outputs, classes = expected.outputs, expected.classes
    if outputs is not None and classes is not None and outputs > classes:
        suggests = "" if cause is not None else " (as the accuracy suggests)"
        found["outputs"] = (
            f"the model has {outputs:,} outputs and the data {classes:,} classes: labels must be the numbers of the "
            f"model's outputs{suggests}, not those of the data's folders"
        )
    return found


def _cause(agreement: Agreement, expected: Expectation) -> str | None:
    """The likely cause of wrong predictions, None where they are not suspicious."""
    moved, labels = agreement.moved(), agreement.labels
    outside = sum(count for answer, count in agreement.predictions.items() if answer not in labels)
    all_seen = len(labels) > 1 and len(labels) >= (expected.classes or 0)
    elsewhere = all_seen and set(labels) == set(range(len(labels))) and 2 * outside > agreement.paired
    if not (moved or elsewhere or agreement.near_chance):
        return None
    if expected.random_weights:
        return "near chance, as random weights are (model.weights: none)"
    if moved:
        return _numbering(moved)
    answer, most = agreement.predictions.most_common(1)[0]
    if len(labels) > 1 and most >= 0.9 * agreement.paired:
        return f"class {answer} is predicted for {most:,}, whatever they show: check model.weights and {PREPARED}"
    if elsewhere:
        return (
            f"labels are 0 to {len(labels) - 1}, but {outside:,} predictions are other classes: labels seem to be "
            f"numbered otherwise than the model's outputs; {REPACK}"
        )
    return (
        "near chance: check that labels are numbered as the model's outputs are, that model.weights are trained, and "
        f"that {PREPARED} is theirs"
    )


def _numbering(moved: dict[int, int]) -> str:
    shifts = Counter(answer - label for label, answer in moved.items())
    shift, count = shifts.most_common(1)[0]
    shown = ", ".join(f"{label} as {answer}" for label, answer in sorted(moved.items())[:3])
    what = (
        f"each label is predicted as the number {abs(shift)} {'above' if shift > 0 else 'below'} it"
        if count >= 0.8 * len(moved)
        else f"labels are mostly predicted as one other class each ({shown})"
    )
    return f"{what}: labels are numbered otherwise than the model's outputs; {REPACK}"


def _sums(counts: Iterable[tuple[int, int]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for key, count in counts:
        found[key] += count
    return found
