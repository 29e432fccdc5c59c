"""Which points of a dense path serve best for a given number of steps, judged by the errors of their intervals.

Errors have signs, and those of neighbouring intervals may cancel: for one image by chance, for most by the shape of the
path. The sum of squared errors is what the residual's square would be if all signs were chance. So points are first
placed by dynamic programming where that sum is least, and then moved one by one while both kinds of residual, with
the signs as they are and by chance, become smaller together.
"""

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.interval_errors import IntervalErrors
from codec_dist.attribution.path_points import PowerPoints

Points = tuple[int, ...]

# Relative residuals far above this count alike, so that a few images on which nothing helps do not decide.
SATURATION = 0.5
# Weight of residuals with signs by chance beside those with the signs of the probe. Learned on 88 composed pictures,
# judged on 20 photographs (EfficientNet-Lite0, worst block / mean over blocks): with 0.3 .38 / .28 for S = 10 and
# .11 / .09 for S = 24; with 3 .21 / .16 and .13 / .10; with 100 .21 / .16 and .14 / .10.
CHANCE_WEIGHT = 3.0
# Share of the worst place beside the mean over places.
WORST_SHARE = 0.5
# Below, nothing is learned, and fixed rules are judged on the images themselves.
FEWEST_IMAGES = 4
# Relative errors that stand for infinite ones.
LARGEST = 1e3
# Rules from whose points others are sought.
STARTS = 2
# Rounds in which each point is moved once; they end earlier when no point moves.
ROUNDS = 30


@dataclass(frozen=True)
class Learned:
    """Points of a dense path, and how they were found to serve.

    Attributes:
        points: numbers of the dense path's points, from the first to the last, ascending.
        rule: which rule gave them.
        expected: for each place, the median over images of the relative residual of images that points were not learned
            on: learned on each half of the images and judged on the other. Of the images themselves where there are
            fewer than ``FEWEST_IMAGES``.
        uniform: the same of as many uniform points, on all images.
    """

    points: Points
    rule: str
    expected: Float[Tensor, "places"]
    uniform: Float[Tensor, "places"]


def learn_points(errors: IntervalErrors, steps: int) -> Learned:
    """The points of a dense path between which contributions add up best, over all places and images.

    Learned points are taken if, learned on each half of the images, they serve better on the other half than points
    of a fixed rule; from fewer than ``FEWEST_IMAGES`` nothing is learned. On the images themselves they are never worse
    than uniform points: by the median over images, neither in the worst place nor in the mean over places. Where
    nothing serves better, points are uniform.

    Args:
        errors: of the dense path; where uniform points are not among its points, the nearest stand for them.
        steps: number of intervals between the points.

    Raises:
        AttributionError: the dense path has fewer points.
    """
    require_whole("steps", steps, least=1)
    dense, images = len(errors.fractions), errors.changes.shape[1]
    if steps >= dense:
        raise AttributionError(f"a dense path of {dense} points has no {steps + 1} points to choose from")
    relative = errors.relative.nan_to_num(LARGEST, LARGEST, -LARGEST)
    uniform = RULES["uniform"](relative, errors.fractions, steps)
    found = []
    for name, rule in RULES.items():
        if images < FEWEST_IMAGES and rule in (_adjusted, _spread):
            continue
        points = rule(relative, errors.fractions, steps)
        if name == "uniform" or _no_worse(errors, points, uniform):
            expected = _crossed(errors, relative, steps, rule)
            found.append(Learned(points, name, expected, median_residuals(errors, uniform)))
    # Of equals the first, which is uniform; rounding is no gain.
    return min(found, key=lambda each: round(float(each.expected.mean() + WORST_SHARE * each.expected.max()), 9))


def median_residuals(errors: IntervalErrors, points: Points) -> Float[Tensor, "places"]:
    """Median over the images of the relative residual of each place."""
    return _medians(errors.residuals(points))


def _medians(residuals: Float[Tensor, "places images"]) -> Float[Tensor, "places"]:
    # Where the target does not change residuals are infinite, between which there is no median.
    return residuals.nan_to_num(LARGEST).clamp(max=LARGEST).quantile(0.5, dim=1)


def _no_worse(errors: IntervalErrors, points: Points, than: Points) -> bool:
    found, other = median_residuals(errors, points), median_residuals(errors, than)
    return bool(found.max() <= other.max() and found.mean() <= other.mean())


def _crossed(errors: IntervalErrors, relative: Tensor, steps: int, rule: "Rule") -> Float[Tensor, "places"]:
    """Median residuals of images that a rule did not see."""
    images = errors.changes.shape[1]
    if images < FEWEST_IMAGES:
        return median_residuals(errors, rule(relative, errors.fractions, steps))
    even, odd = (torch.arange(first, images, 2) for first in (0, 1))
    found = torch.empty_like(errors.changes)
    for seen, others in ((even, odd), (odd, even)):
        found[:, others] = errors.residuals(rule(relative[:, seen], errors.fractions, steps))[:, others]
    return _medians(found)


Rule = Callable[[Tensor, Sequence[float], int], Points]


def _adjusted(relative: Float[Tensor, "places images points points"], fractions: Sequence[float], steps: int) -> Points:
    """Points that are moved one by one, from the better of the other rules' points."""
    starts = [rule(relative, fractions, steps) for rule in RULES.values() if rule is not _adjusted]
    starts = sorted(starts, key=lambda points: _objective_at(relative, points))[:STARTS]
    return min(_descend(relative, start) for start in starts)[1]


def _spread(relative: Float[Tensor, "places images points points"], fractions: Sequence[float], steps: int) -> Points:
    """Points with the least sum of squared errors, which is what the residual's square is where signs are random."""
    alphas = torch.tensor(fractions, dtype=relative.dtype)
    # Where nothing else tells them apart, intervals are of equal width.
    width = 1e-9 * (alphas[None, :] - alphas[:, None]).square()
    return _cheapest_path(relative.square().quantile(0.5, dim=1).mean(dim=0) + width, steps)


def _power(exponent: float) -> Rule:
    def rule(relative: Tensor, fractions: Sequence[float], steps: int) -> Points:
        return _nearest(fractions, PowerPoints(exponent).fractions(steps))

    return rule


RULES: dict[str, Rule] = {
    "uniform": _power(1.0),
    "square": _power(2.0),
    "cubic": _power(3.0),
    "least squares": _spread,
    "learned": _adjusted,
}


def _objective(residuals: Tensor, squares: Tensor) -> Float[Tensor, "candidates"]:
    """What is minimised, from residuals and sums of squared errors [places, images, candidates]."""
    found = residuals.new_zeros(())
    for sizes, weight in ((residuals.abs(), 1.0), (squares.clamp(min=0).sqrt(), CHANCE_WEIGHT)):
        by_place = (SATURATION * sizes / (SATURATION + sizes)).mean(dim=1)
        found = found + weight * (by_place.mean(dim=0) + WORST_SHARE * by_place.amax(dim=0))
    return found


def _descend(relative: Float[Tensor, "places images points points"], start: Points) -> tuple[float, Points]:
    """Take out one point after another and put it where the objective is least, until none moves."""
    points, squares = list(start), relative.square()
    for _ in range(ROUNDS):
        before = list(points)
        for point in before[1:-1]:
            points = _relocated(relative, squares, points, point)
        if points == before:
            break
    return _objective_at(relative, points), tuple(points)


def _relocated(relative: Tensor, squares: Tensor, points: Sequence[int], point: int) -> list[int]:
    """The points with one of them where it serves best; as they are if that is no better."""
    others = [each for each in points if each != point]
    candidates = [each for each in range(others[-1]) if each not in others]
    upper = [bisect(others, candidate) for candidate in candidates]
    below, above = [others[place - 1] for place in upper], [others[place] for place in upper]

    def sums(errors: Tensor) -> Tensor:
        whole = errors[:, :, others[:-1], others[1:]].sum(dim=2, keepdim=True)
        return whole - errors[:, :, below, above] + errors[:, :, below, candidates] + errors[:, :, candidates, above]

    found = _objective(sums(relative), sums(squares))
    best = int(found.argmin())
    # Rounding must not let points wander for ever.
    if found[best] < found[candidates.index(point)] - 1e-9:
        return sorted([*others, candidates[best]])
    return list(points)


def _objective_at(relative: Tensor, points: Sequence[int]) -> float:
    errors = relative[:, :, list(points[:-1]), list(points[1:])]
    return float(_objective(errors.sum(dim=2, keepdim=True), errors.square().sum(dim=2, keepdim=True)))


def _cheapest_path(cost: Float[Tensor, "points points"], steps: int) -> Points:
    """The path of so many intervals from the first point to the last whose costs add up to least."""
    points = len(cost)
    forward = torch.where(torch.ones_like(cost, dtype=torch.bool).triu(1), cost, torch.inf)
    total, back = forward[0], []
    for _ in range(steps - 1):
        total, previous = (total[:, None] + forward).min(dim=0)
        back.append(previous)
    path = [points - 1]
    for previous in reversed(back):
        path.append(int(previous[path[-1]]))
    return tuple(reversed([*path, 0]))


def _nearest(fractions: Sequence[float], wanted: Iterable[float]) -> Points:
    """The dense points closest to some fractions, each another one, in order."""
    wanted, found = list(wanted), [0]
    for number, fraction in enumerate(wanted[1:-1], start=1):
        last = len(fractions) - (len(wanted) - number)
        free = range(found[-1] + 1, last + 1)
        found.append(min(free, key=lambda point: abs(fractions[point] - fraction)))
    return (*found, len(fractions) - 1)
