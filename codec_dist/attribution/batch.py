"""One microbatch: its contributions, what is reduced beside them, and the check that all is finite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.errors import AttributionError, NotFiniteError
from codec_dist.attribution.evaluation import Evaluation, Point
from codec_dist.attribution.methods import Contributions, Method
from codec_dist.attribution.reductions import Reduction, Split
from codec_dist.attribution.results import AttributionResult, LayerResult
from codec_dist.models import LayerKey

Images = Float[Tensor, "batch ..."]


@dataclass
class LayerSettings:
    """What is wanted of every layer.

    Attributes:
        reductions: how the layer of each key is reduced.
        activations, gradients: whether these are reduced at the images, too.
        cuts: whether each site is a cut.
    """

    reductions: Mapping[LayerKey, Reduction]
    activations: bool
    gradients: bool
    cuts: Mapping[LayerKey, bool] = field(default_factory=dict)

    def reduce(self, key: LayerKey, values: Float[Tensor, "..."], batch: int) -> Split:
        """Positive and negative parts [batch, channels].

        Raises:
            AttributionError: the layer does not hold one row per image.
        """
        positive, negative = self.reductions[key].split(values)
        if len(positive) != batch:
            raise AttributionError(
                f"layer {key} is {list(values.shape)} for {batch} images: its first dimension must be the batch; "
                "choose the block around it"
            )
        return positive, negative


@dataclass(frozen=True)
class BatchTotals:
    """Contributions of one microbatch before their reduction.

    Attributes:
        images: the images.
        settings: what is wanted of every layer.
        prediction: index of the largest output at the images.
        values: T(x) of each target.
        contributions: what the method found.
        beside: for each target and key, what is reduced at the images.
        names: names of the targets.
        complete: whether the method's contributions have a residual.
    """

    images: Images
    settings: LayerSettings
    prediction: Int[Tensor, "batch"]
    values: Sequence[Float[Tensor, "batch"]]
    contributions: Contributions
    beside: Sequence[Mapping[LayerKey, Mapping[str, Tensor]]]
    names: Sequence[str]
    complete: bool

    def result(self) -> AttributionResult:
        """Everything reduced: the first target's result, with those of the others."""
        first, *others = (self._of_target(number) for number in range(len(self.names)))
        first.others.update({result.target: result for result in others})
        return first

    def maps(self, channels: Mapping[str, Sequence[int]]) -> dict[str, Float[Tensor, "batch chosen ..."]]:
        """Contributions to the first target of some channels at every position."""
        found = {}
        for key, reduction in self.settings.reductions.items():
            if str(key) in channels:
                values = self.contributions.totals[0][key.site].values()
                selected = reduction.arrange(values)[:, list(channels[str(key)])]
                found[str(key)] = selected.unflatten(2, reduction.positions(values))
        for layer, values in found.items():
            if not values.isfinite().all():
                samples = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
                raise NotFiniteError(f"sample {samples[0]} of the batch: maps of layer {layer} are not finite", samples)
        return found

    def _of_target(self, number: int) -> AttributionResult:
        totals, value = self.contributions.totals[number], self.values[number]
        baselines = self.contributions.baseline_values
        split = {key: totals[key.site].split(reduction) for key, reduction in self.settings.reductions.items()}
        residuals: dict[LayerKey, Tensor] = {}
        if self.complete and baselines is not None:
            change = value - baselines[number]
            residuals = {site: _total(site, totals, split) - change for site, cut in self.settings.cuts.items() if cut}
        layers = {
            str(key): LayerResult(*split[key], **self.beside[number][key], completeness=residuals.get(key.site))
            for key in self.settings.reductions
        }
        start = torch.full_like(value, torch.nan) if baselines is None else baselines[number]
        steps = self.contributions.steps
        return AttributionResult(layers, value, start, self.prediction, self.names[number], steps=steps)


def _total(site: LayerKey, totals: Mapping, split: Mapping[LayerKey, Split]) -> Float[Tensor, "batch"]:
    """ΣC over all positions; the default reduction has added most of it up already."""
    if site in split:
        positive, negative = split[site]
        return (positive + negative).sum(dim=1)
    total: Tensor = totals[site].total()
    return total


def explain(
    method: Method,
    settings: LayerSettings,
    evaluation: Evaluation,
    images: Images,
    labels: Int[Tensor, "batch"] | None,
) -> BatchTotals:
    """Contributions of one microbatch.

    Raises:
        AttributionError: a target that cannot be had from this output, or a layer that does not lead to it.
    """
    point = evaluation.begin(images, labels)
    beside = [_beside(settings, point, number) for number in range(len(evaluation.targets))]
    values, prediction = point.targets, point.output.argmax(dim=1)
    contributions = method.contributions(images, point, evaluation)
    names = [target.name for target in evaluation.targets]
    return BatchTotals(images, settings, prediction, values, contributions, beside, names, method.complete)


def check_finite(evaluation: Evaluation, images: Images, result: AttributionResult, first: int) -> None:
    """Refuse numbers that are not finite.

    Args:
        evaluation: finds out where they begin.
        images: of the microbatch.
        result: its numbers.
        first: place of its first image in the batch, for the message.

    Raises:
        NotFiniteError: names the first layer that is not finite, and all samples.
    """
    finite = {}
    for each in (result, *result.others.values()):
        finite["", each.target] = each.target_value.isfinite()
        for name, layer in each.items():
            quantities = layer.quantities().values()
            finite[name, each.target] = torch.stack([values.isfinite().all(dim=1) for values in quantities]).all(dim=0)
    all_finite = torch.stack(list(finite.values())).all(dim=0)
    if all_finite.all():  # waits for the device, once for all layers and samples
        return
    faulty = (~all_finite).nonzero().flatten().tolist()
    samples = [first + index for index in faulty]
    cause = evaluation.where_not_finite(images[faulty[:1]])
    if cause is None:
        name, target = next(place for place, values in finite.items() if not values[faulty[0]])
        cause = f"the gradients or contributions of layer {name} are" if name else f"the target {target} is"
    raise NotFiniteError(f"sample {samples[0]} of the batch: {cause} not finite (NaN or infinity)", samples)


def _beside(settings: LayerSettings, point: Point, number: int) -> dict[LayerKey, dict[str, Tensor]]:
    """What is reduced at the images, for one target; activations are the same for all."""
    batch = len(point.output)
    beside: dict[LayerKey, dict[str, Tensor]] = {}
    for key in settings.reductions:
        reduced = beside[key] = {}
        if settings.activations:
            reduced["activation_positive"], reduced["activation_negative"] = settings.reduce(
                key, point.hidden[key.site], batch
            )
        if settings.gradients:
            reduced["gradient_positive"], reduced["gradient_negative"] = settings.reduce(
                key, point.gradients[number][key.site], batch
            )
    return beside
