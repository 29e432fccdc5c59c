"""More path points for the images that need them, until each image's contributions add up.

At a cut layer the error of every interval of the path is known (see :mod:`codec_dist.attribution.interval_errors`), so
an image whose residual is too large gets another point in the middle of its worst interval, again and again. Images
decide for themselves: what is found for one depends on the others of its batch by rounding alone. h and g of all
points are kept until the image's sum is taken, because any interval may be the next to be divided: ``most + 1`` points
at most.
"""

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.capture import widened
from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.attribution.path_sums import HiddenTotal, PathSum, RunningSum
from codec_dist.attribution.reductions import Reduction, Split
from codec_dist.models import LayerKey

# A change of the target below this part of its value counts as one of this size: there is nothing to explain.
SMALLEST_CHANGE = 1e-6
# Intervals this narrow are not divided any more: the target jumps there.
NARROWEST = 2.0**-20


@dataclass(frozen=True)
class Adaptive:
    """How far each image's path is refined.

    Attributes:
        tolerance: relative residual, of the worst cut layer and target, that is good enough.
        most: steps of an image's path at most.
    """

    tolerance: int | float = 0.1
    most: int = 30

    def __post_init__(self) -> None:
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not self.tolerance > 0:
            raise AttributionError(f"adaptive: tolerance is {self.tolerance!r}: it must be above 0")
        require_whole("adaptive: most", self.most, least=1)


def as_adaptive(value: object) -> Adaptive | None:
    """The setting from what a user or a config gives: nothing, {tolerance, most}, or an :class:`Adaptive`.

    Raises:
        AttributionError: it is none of these.
    """
    if value is None or isinstance(value, Adaptive):
        return value
    if isinstance(value, Mapping) and set(value) <= {"tolerance", "most"}:
        options: Any = dict(value)
        return Adaptive(**options)
    raise AttributionError(f"bad adaptive {value!r}: give {{tolerance: 0.1, most: 30}}, either or none of them")


class PointOfImage(NamedTuple):
    """One image's row of an evaluated point; sorted by α."""

    fraction: float
    number: int
    row: int


class ImagePaths:
    """The paths of the images of one batch, each with points of its own.

    Args:
        evaluation: evaluates points; its targets and cut layers count.
        images: where the paths end.
        start: where they begin, for all images or for each.
    """

    def __init__(self, evaluation: Evaluation, images: Float[Tensor, "batch ..."], start: Tensor) -> None:
        self._evaluation, self._images, self._start = evaluation, images, start
        self._points: list[Point] = []
        self._paths: list[list[PointOfImage]] = [[] for _ in range(len(images))]
        self._errors: list[dict[tuple[float, float], Tensor]] = [{} for _ in range(len(images))]

    @property
    def steps(self) -> Int[Tensor, "batch"]:
        """Steps of each image's path."""
        return torch.tensor([len(path) - 1 for path in self._paths], device=self._images.device)

    def add(self, point: Point, fraction: float) -> None:
        """Take in a point of all images; of one row that serves all, if they share the baseline."""
        rows = range(len(self._images)) if len(point.output) > 1 else [0] * len(self._images)
        self._enter(point, [fraction] * len(self._images), list(range(len(self._images))), rows)

    def refine(self, adaptive: Adaptive) -> None:
        """Divide intervals until every image's residual is within tolerance, or it has the most steps."""
        self._measure([(image, *pair) for image, path in enumerate(self._paths) for pair in pairwise(path)])
        active = list(range(len(self._images)))
        while True:
            found = [(image, self._next(image, adaptive)) for image in active]
            middles = {image: middle for image, middle in found if middle is not None}
            active = list(middles)
            if not active:
                return
            self._divide(active, list(middles.values()))

    def totals(self, make: Callable[[], PathSum]) -> list[dict[LayerKey, HiddenTotal]]:
        """For each target the contributions of every site, summed along each image's own points."""
        groups: dict[int, list[int]] = {}
        for image, path in enumerate(self._paths):
            groups.setdefault(len(path), []).append(image)
        sites = list(self._points[0].hidden)
        totals: list[dict[LayerKey, HiddenTotal]] = []
        for target in range(len(self._evaluation.targets)):
            # A sum that keeps its points would keep copies of them where an image's points are rows of several.
            kind = make if len(groups) == 1 else RunningSum
            sums = [{site: self._sum(images, site, target, kind()) for site in sites} for images in groups.values()]
            order = torch.tensor([image for images in groups.values() for image in images], device=self._images.device)
            totals.append({site: _joined([each[site] for each in sums], order) for site in sites})
        return totals

    def _enter(self, point: Point, fractions: Sequence[float], images: Sequence[int], rows: Sequence[int]) -> None:
        for image, fraction, row in zip(images, fractions, rows, strict=True):
            insort(self._paths[image], PointOfImage(fraction, len(self._points), row))
        self._points.append(point)

    def _next(self, image: int, adaptive: Adaptive) -> float | None:
        """α that divides the image's worst interval; None: the image is done."""
        path = self._paths[image]
        if len(path) > adaptive.most or math.isinf(adaptive.tolerance):
            return None
        pairs = [(lower.fraction, upper.fraction) for lower, upper in pairwise(path)]
        errors = torch.stack([self._errors[image][pair] for pair in pairs])
        if not (errors.sum(dim=0).abs() > adaptive.tolerance).any():
            return None
        wide = torch.tensor([upper - lower > NARROWEST for lower, upper in pairs])
        if not wide.any():
            return None
        worst = errors.abs().amax(dim=1).nan_to_num().masked_fill(~wide, -1)
        lower, upper = pairs[int(worst.argmax())]
        return (lower + upper) / 2

    def _divide(self, images: Sequence[int], fractions: Sequence[float]) -> None:
        """Evaluate one more point of each of some images, and measure the intervals on both of its sides."""
        rows = torch.tensor(images, device=self._images.device)
        start = self._start if len(self._start) == 1 else self._start[rows]
        weights = torch.tensor(fractions, dtype=self._images.dtype, device=self._images.device)
        inputs = start.lerp(self._images[rows], weights.reshape(-1, *[1] * (self._images.ndim - 1)))
        self._enter(self._evaluation.at_rows(inputs, rows), fractions, images, range(len(images)))
        intervals = []
        for image, fraction in zip(images, fractions, strict=True):
            path = self._paths[image]
            place = [point.fraction for point in path].index(fraction)
            intervals += [(image, path[place - 1], path[place]), (image, path[place], path[place + 1])]
        self._measure(intervals)

    def _measure(self, intervals: Sequence[tuple[int, PointOfImage, PointOfImage]]) -> None:
        """Errors of some intervals, relative to what is explained of their image, of every cut layer and target."""
        lower, upper = [each[1] for each in intervals], [each[2] for each in intervals]
        images = [each[0] for each in intervals]
        errors = []
        for target in range(len(self._evaluation.targets)):

            def value(point: Point, target: int = target) -> Tensor:
                return point.targets[target]

            ends = [[self._paths[image][end] for image in images] for end in (0, -1)]
            first, last, below, above = (self._gather(some, value).double() for some in (*ends, lower, upper))
            floor = SMALLEST_CHANGE * last.abs().maximum(first.abs())
            for site in self._evaluation.cuts:
                total = self._trapezoid(lower, upper, site, target).double()
                error = total - (above - below)
                errors.append(torch.where(error == 0, 0, error / (last - first).abs().maximum(floor)))
        found = torch.stack(errors, dim=1).cpu()
        for (image, below_point, above_point), error in zip(intervals, found, strict=True):
            self._errors[image][below_point.fraction, above_point.fraction] = error

    def _trapezoid(
        self, lower: Sequence[PointOfImage], upper: Sequence[PointOfImage], site: LayerKey, target: int
    ) -> Float[Tensor, "intervals"]:
        """Σ ½ (g_a + g_b) (h_b - h_a) of each interval, one by one so that no more memory is needed than they fill."""
        found = []
        for below, above in zip(lower, upper, strict=True):
            low, high = self._points[below.number], self._points[above.number]
            change = widened(high.hidden[site][above.row]) - widened(low.hidden[site][below.row])
            slope = widened(high.gradients[target][site][above.row]) + widened(low.gradients[target][site][below.row])
            found.append(0.5 * (change * slope).sum())
        return torch.stack(found)

    def _sum(self, images: Sequence[int], site: LayerKey, target: int, total: PathSum) -> PathSum:
        """The sum of images whose paths have equally many points, from the images to the baseline."""
        for place in reversed(range(len(self._paths[images[0]]))):
            points = [self._paths[image][place] for image in images]
            hidden = self._gather(points, lambda point: point.hidden[site])
            total.add(hidden, self._gather(points, lambda point: point.gradients[target][site]))
        return total

    def _gather(self, places: Sequence[PointOfImage], part: Callable[[Point], Tensor]) -> Tensor:
        """One row of every image; without a copy where they are all rows of one point, or one row serves all."""
        numbers = {place.number for place in places}
        if len(numbers) == 1:
            whole = part(self._points[numbers.pop()])
            if len(whole) == 1 or [place.row for place in places] == list(range(len(whole))):
                return whole.expand(len(places)) if whole.ndim == 1 else whole
        return torch.stack([part(self._points[place.number])[place.row] for place in places])


class JoinedTotal(HiddenTotal):
    """Contributions of parts of a batch, put back in the batch's order.

    Args:
        parts: the totals of the parts.
        order: for each row of the parts, one after another, its place in the batch.
    """

    def __init__(self, parts: Sequence[HiddenTotal], order: Int[Tensor, "batch"]) -> None:
        self._parts, self._places = parts, order.argsort()

    def split(self, reduction: Reduction) -> Split:
        """Split by sign at each position, then summed."""
        positive, negative = zip(*(part.split(reduction) for part in self._parts))
        return torch.cat(positive)[self._places], torch.cat(negative)[self._places]

    def total(self) -> Float[Tensor, "batch"]:
        """Sum over everything but the batch."""
        return torch.cat([part.total() for part in self._parts])[self._places]

    def values(self) -> Float[Tensor, "batch ..."]:
        """The contributions themselves."""
        return torch.cat([part.values() for part in self._parts])[self._places]


def _joined(parts: Sequence[HiddenTotal], order: Int[Tensor, "batch"]) -> HiddenTotal:
    return parts[0] if len(parts) == 1 else JoinedTotal(parts, order)
