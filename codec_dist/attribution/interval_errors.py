"""How far the trapezoid rule misses between any two points of a path, measured once on a dense path.

At a cut layer completeness holds on every part of the path: between the points a and b the contributions
½ (g_a + g_b) · (h_b - h_a) should add up to T_b - T_a. What they miss is the error of that interval, and the residual
of any choice of points is the sum of the errors of its intervals. So after one walk over a dense path every choice of
its points can be judged by adding up numbers, without the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.attribution.path_points import GivenPoints
from codec_dist.attribution.results import relative_residual
from codec_dist.models import LayerKey
from codec_dist.utils import available_memory

# Bytes of h and g that are kept at once, and no more than this part of what is free; more layers than fit are measured
# in further walks.
KEPT_BYTES, KEPT_PART = {"cpu": 1 << 30, "cuda": 1 << 33}, 1 / 8


class Place(NamedTuple):
    """Where errors are measured.

    Attributes:
        layer: a cut layer, or ``input`` for the images themselves.
        target: name of the target.
    """

    layer: str
    target: str

    def __str__(self) -> str:
        return self.layer


@dataclass(frozen=True)
class IntervalErrors:
    """The error of every interval between two points of a dense path.

    Attributes:
        fractions: α of the dense path's points, from 0 to 1, ascending.
        places: layers and targets.
        errors: float64; of the interval from the point ``a`` to the point ``b`` above it: Σ ½ (g_a + g_b)(h_b - h_a)
            - (T_b - T_a); the negative of it the other way round.
        changes: T(x) - T(x₀), float64.
    """

    fractions: tuple[float, ...]
    places: tuple[Place, ...]
    errors: Float[Tensor, "places images points points"]
    changes: Float[Tensor, "places images"]

    def __post_init__(self) -> None:
        expected = (len(self.places), self.changes.shape[1], len(self.fractions), len(self.fractions))
        assert self.errors.shape == expected, f"{self.errors.shape} is not {expected}"

    @classmethod
    def join(cls, parts: Sequence["IntervalErrors"]) -> "IntervalErrors":
        """Those of several batches of images, measured alike, as one."""
        first = parts[0]
        assert all((each.fractions, each.places) == (first.fractions, first.places) for each in parts)
        errors = torch.cat([each.errors for each in parts], dim=1)
        return cls(first.fractions, first.places, errors, torch.cat([each.changes for each in parts], dim=1))

    def of_images(self, images: Int[Tensor, "chosen"]) -> "IntervalErrors":
        """Those of some images."""
        return replace(self, errors=self.errors[:, images], changes=self.changes[:, images])

    @property
    def not_finite(self) -> list[int]:
        """Images whose path gives a NaN or an infinity."""
        finite = self.errors.isfinite().flatten(2).all(dim=2).all(dim=0)
        return (~finite).nonzero().flatten().tolist()

    @property
    def relative(self) -> Float[Tensor, "places images points points"]:
        """Errors in units of what is to be explained, with their signs (see :func:`relative_residual`)."""
        changes = self.changes.abs()
        scale = changes.maximum(1e-3 * changes.quantile(0.5, dim=1, keepdim=True))[:, :, None, None]
        return torch.where(self.errors == 0, 0, self.errors / scale)

    def of(self, points: Sequence[int]) -> Float[Tensor, "places images intervals"]:
        """Errors of the intervals between neighbours among some of the dense path's points.

        Args:
            points: numbers of dense points, ascending.
        """
        return self.errors[:, :, list(points[:-1]), list(points[1:])]

    def residuals(self, points: Sequence[int]) -> Float[Tensor, "places images"]:
        """Relative residuals of the path through some of the dense path's points, from the first to the last."""
        nothing = torch.zeros_like(self.changes[0])
        pairs = zip(self.of(points).sum(dim=2), self.changes, strict=True)
        return torch.stack([relative_residual(residual, change, nothing) for residual, change in pairs])


def measure_intervals(
    evaluation: Evaluation,
    images: Float[Tensor, "batch ..."],
    labels: Tensor | None,
    start: Float[Tensor, "starts ..."],
    fractions: Sequence[float],
    sites: Mapping[LayerKey, str],
    kept_bytes: int | None = None,
) -> IntervalErrors:
    """Walk over a dense path, image by image, and compare every two points of it.

    Costs an evaluation of each point for each image, and as many again for every ``kept_bytes`` that h and g of all
    points fill beyond the first.

    Args:
        evaluation: ready to evaluate points.
        images: where the path ends.
        labels: their true classes, where a target needs them.
        start: where it begins, for all images or for each.
        fractions: α of the points, from 0 to 1, ascending.
        sites: the cut layers and their names; empty: the images themselves take their place.
        kept_bytes: of h and g that may be kept at once, of one layer at least; default: see :func:`affordable_bytes`.

    Raises:
        AttributionError: the points do not ascend from 0 to 1.
    """
    GivenPoints(list(fractions))
    kept_bytes = affordable_bytes(images.device) if kept_bytes is None else kept_bytes
    errors, changes = [], []
    for number in range(len(images)):
        image = images[number : number + 1]
        label = None if labels is None else labels[number : number + 1]
        evaluation.begin(image, label)
        single = start[number : number + 1] if len(start) > 1 else start
        found = [_of_path(path) for path in _paths(evaluation, image, single, fractions, sites, kept_bytes)]
        errors.append(torch.stack([each for each, _ in found]))
        changes.append(torch.stack([change for _, change in found]))
    names = list(sites.values()) or ["input"]
    places = tuple(Place(name, target.name) for name in names for target in evaluation.targets)
    return IntervalErrors(tuple(fractions), places, torch.stack(errors, dim=1), torch.stack(changes, dim=1))


def affordable_bytes(device: torch.device) -> int:
    """How much of h and g may be kept on a device now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return min(KEPT_BYTES.get(device.type, KEPT_BYTES["cpu"]), int(KEPT_PART * free))


class _Path(NamedTuple):
    """h, g and T of all points of one image's path, of one layer and target."""

    hidden: Float[Tensor, "points numbers"]
    gradients: Float[Tensor, "points numbers"]
    targets: Float[Tensor, "points"]


def _of_path(path: _Path) -> tuple[Float[Tensor, "points points"], Float[Tensor, ""]]:
    """Errors of every interval, and the change of the target."""
    # Changes of h first: differences of products would lose what neighbouring points have in common.
    # On the CPU: on GPUs cumulative sums have no deterministic form.
    products = (path.gradients @ path.hidden.diff(dim=0).T).double().cpu()
    # upto[a, b] = g_a · (h_b - h_0)
    upto = torch.nn.functional.pad(products.cumsum(dim=1), (1, 0))
    own = upto.diagonal()
    targets = path.targets.double().cpu()
    contributions = 0.5 * (upto - own[:, None] + own[None, :] - upto.T)
    return contributions - (targets[None, :] - targets[:, None]), targets[-1] - targets[0]


def _paths(
    evaluation: Evaluation,
    image: Float[Tensor, "one ..."],
    start: Float[Tensor, "one ..."],
    fractions: Sequence[float],
    sites: Mapping[LayerKey, str],
    kept_bytes: int,
) -> Iterator[_Path]:
    """The path of every layer and target; layer after layer, so that memory is bounded."""
    if not sites:
        yield from _input_paths(evaluation, image, start, fractions)
        return
    remaining = list(sites)
    while remaining:
        group = remaining[:1]
        points: list[Point] = []
        for point in _walk(evaluation, image, start, fractions):
            if not points:
                group = _fitting(point, remaining, len(fractions), kept_bytes)
            kept = {site: point.hidden[site].clone() for site in group}
            slopes = tuple({site: each[site].clone() for site in group} for each in point.gradients)
            points.append(Point(point.output, point.targets, kept, slopes))
        for site in group:
            hidden = torch.stack([point.hidden[site].flatten() for point in points])
            for target in range(len(evaluation.targets)):
                gradients = torch.stack([point.gradients[target][site].flatten() for point in points])
                values = torch.cat([point.targets[target] for point in points])
                wide = torch.promote_types(hidden.dtype, torch.float32)
                yield _Path(hidden.to(wide), gradients.to(wide), values)
        remaining = remaining[len(group) :]


def _input_paths(
    evaluation: Evaluation, image: Float[Tensor, "one ..."], start: Float[Tensor, "one ..."], fractions: Sequence[float]
) -> Iterator[_Path]:
    """The path of the image itself, for every target: h moves along a line, so one number per point says all."""
    at_once, values, slopes = evaluation.points_at_once(1), [], []
    for first in range(0, len(fractions), at_once):
        inputs = torch.cat([start.lerp(image, fraction) for fraction in fractions[first : first + at_once]])
        targets, gradients = evaluation.input_gradients(inputs)
        values.append(torch.stack(targets))
        slopes.append(torch.stack([(each * (image - start)).flatten(1).sum(dim=1) for each in gradients]))
    alphas = torch.tensor(fractions, dtype=torch.float64, device=image.device)[:, None]
    for value, slope in zip(torch.cat(values, dim=1), torch.cat(slopes, dim=1), strict=True):
        yield _Path(alphas, slope.double()[:, None], value)


def _walk(
    evaluation: Evaluation,
    image: Float[Tensor, "one ..."],
    start: Float[Tensor, "one ..."],
    fractions: Sequence[float],
) -> Iterator[Point]:
    at_once = evaluation.points_at_once(1)
    for first in range(0, len(fractions), at_once):
        inputs = [start.lerp(image, fraction) for fraction in fractions[first : first + at_once]]
        yield from evaluation.at(*inputs)


def _fitting(point: Point, sites: Sequence[LayerKey], points: int, kept_bytes: int) -> list[LayerKey]:
    """As many of the first sites as may be kept at all points, at least one."""
    group, kept = [sites[0]], 0
    for site in sites:
        tensor = point.hidden[site]
        kept += points * (1 + len(point.gradients)) * tensor.numel() * tensor.element_size()
        if kept > kept_bytes:
            break
        if site != sites[0]:
            group.append(site)
    return group
