"""Targets: the scalar T(x) of the output that contributions explain (docs/method.md §2.6)."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.data_statistics import DataStatistics, ridged_inverse
from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.attribution.image_memory import is_out_of_memory
from codec_dist.utils import CodecError, Registry

Output = Float[Tensor, "batch outputs"]
Scalar = Float[Tensor, "batch"]
Labels = Int[Tensor, "batch"]
Choice = Int[Tensor, "batch chosen"]


class Target(ABC):
    """A scalar of the output per sample.

    A target may choose outputs once per sample, at the image itself, and keep them along the path. A user's
    own is a subclass (or, simpler, a function, see :class:`FunctionTarget`), entered in ``TARGETS`` or
    named in a config by its import path.
    """

    needs_statistics: ClassVar[bool] = False
    """Whether it must be fitted to a data set first."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A label that is safe in paths, such as ``top_1``."""

    @property
    def needs_labels(self) -> bool:
        """Whether samples without a label cannot be explained."""
        return False

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """Outputs chosen for each sample from the output at the image; None: the same rule at every point."""
        del output, labels
        return None

    @abstractmethod
    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The target [batch] of ``output`` [batch, outputs], differentiable."""

    def fitted(self, statistics: DataStatistics) -> "Target":
        """The target with what it needs of a data set; itself if that is nothing."""
        del statistics
        return self


class FunctionTarget(Target):
    """A target that a user gives as a function of the model's output.

    Args:
        function: from the output [batch, outputs], by differentiable operations, to [batch]. If it has a
            parameter ``labels`` it also gets the true classes [batch].
        name: a label; default the function's own name.
    """

    def __init__(self, function: Callable[..., Scalar], name: str | None = None) -> None:
        self.function = function
        self._name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self._takes_labels = "labels" in inspect.signature(function).parameters

    @property
    def name(self) -> str:
        """The label, with letters, digits, dots and underscores alone."""
        return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in self._name)

    @property
    def needs_labels(self) -> bool:
        """Whether the function takes labels."""
        return self._takes_labels

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """The labels, if the function takes them."""
        return _checked_labels(self.name, output, labels) if self._takes_labels else None

    def value(self, output: Output, choice: Choice | None) -> Tensor:
        """What the function returns; the engine refuses what is not [batch]."""
        return self.function(output) if choice is None else self.function(output, labels=choice.squeeze(1))


@contextmanager
def named_errors(target: Target) -> Iterator[None]:
    """Let whatever a target raises name it; too little memory is for others to deal with.

    Raises:
        AttributionError: the target raised something else than an error of this package.
    """
    try:
        yield
    except CodecError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise AttributionError(f"target {target.name} raised {type(error).__name__}: {reason}") from error


def _import_target(found: Any, name: str) -> Callable[..., Target]:
    """The factory for what an import path names: a target class, or a function of the output."""
    if isinstance(found, type) and issubclass(found, Target):
        return found
    if not callable(found):
        raise AttributionError(f"target {name!r} is a {type(found).__name__}, not a function of the output")

    def make(**options: Any) -> Target:
        written = "".join(f"_{option}_{value}" for option, value in options.items())
        return FunctionTarget(partial(found, **options), name.replace(":", ".") + written)

    # The registry checks options against the function's parameters; those that the engine fills are not options.
    signature = inspect.signature(found)
    options = [option for option in list(signature.parameters.values())[1:] if option.name != "labels"]
    make.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return make


TARGETS: Registry[Target] = Registry("target", AttributionError, imported=_import_target)


@TARGETS.register("top_k")
@dataclass(frozen=True)
class TopK(Target):
    """Sum of the k largest outputs, chosen again at every path point (the paper's), or ``frozen`` at the image."""

    k: int = 1
    frozen: bool = False
    probabilities: bool = False

    def __post_init__(self) -> None:
        require_whole("target top_k: k", self.k, least=1)

    @property
    def name(self) -> str:
        """``top_1``, ``top_5_frozen``, ``top_1_probability``."""
        return f"top_{self.k}" + ("_frozen" if self.frozen else "") + _suffix(self.probabilities)

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """The k largest outputs of each image, if frozen."""
        if self.k > output.shape[1]:
            raise AttributionError(f"target top_k: k is {self.k}, the model has only {output.shape[1]} outputs")
        return output.topk(self.k, dim=1).indices if self.frozen else None

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """Sum of the k largest, or of the chosen."""
        values = _scores(output, self.probabilities)
        if choice is not None:
            return values.gather(1, choice).sum(dim=1)
        return values.topk(self.k, dim=1).values.sum(dim=1)


@TARGETS.register("rank")
@dataclass(frozen=True)
class Rank(Target):
    """The output of one rank: 1 is the largest. Several of them in one pass explain each of the top classes.

    Args:
        rank: from 1 up.
        frozen: keep the class that has this rank at the image, else choose again at every path point.
        probabilities: of the softmax probabilities.
    """

    rank: int = 1
    frozen: bool = True
    probabilities: bool = False

    def __post_init__(self) -> None:
        require_whole("target rank: rank", self.rank, least=1)

    @property
    def name(self) -> str:
        """``rank_2``, ``rank_2_moving``, ``rank_2_probability``."""
        return f"rank_{self.rank}" + ("" if self.frozen else "_moving") + _suffix(self.probabilities)

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """The class of this rank at each image, if frozen."""
        if self.rank > output.shape[1]:
            raise AttributionError(f"target rank: rank is {self.rank}, the model has only {output.shape[1]} outputs")
        return output.topk(self.rank, dim=1).indices[:, -1:] if self.frozen else None

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The output of that class, or of that rank."""
        values = _scores(output, self.probabilities)
        if choice is not None:
            return values.gather(1, choice).squeeze(1)
        return values.topk(self.rank, dim=1).values[:, -1]


@TARGETS.register("class")
@dataclass(frozen=True)
class GivenClass(Target):
    """The output of one given class, the same for every sample."""

    index: int
    probabilities: bool = False

    def __post_init__(self) -> None:
        require_whole("target class: index", self.index, least=0)

    @property
    def name(self) -> str:
        """``class_3``, ``class_3_probability``."""
        return f"class_{self.index}" + _suffix(self.probabilities)

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The class's output."""
        if self.index >= output.shape[1]:
            raise AttributionError(f"target class: index {self.index} of a model with {output.shape[1]} outputs")
        return _scores(output, self.probabilities)[:, self.index]


@TARGETS.register("label")
@dataclass(frozen=True)
class TrueLabel(Target):
    """The output of each sample's true class."""

    probabilities: bool = False

    @property
    def needs_labels(self) -> bool:
        """Always."""
        return True

    @property
    def name(self) -> str:
        """``label``, ``label_probability``."""
        return "label" + _suffix(self.probabilities)

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """The labels."""
        return _checked_labels("label", output, labels)

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The true class's output."""
        assert choice is not None
        return _scores(output, self.probabilities).gather(1, choice).squeeze(1)


@TARGETS.register("sum")
@dataclass(frozen=True)
class OutputSum(Target):
    """Sum of all outputs."""

    @property
    def name(self) -> str:
        """``sum``."""
        return "sum"

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The sum."""
        return output.sum(dim=1)


@TARGETS.register("entropy")
@dataclass(frozen=True)
class Entropy(Target):
    """Entropy of the softmax of the outputs, in nats."""

    @property
    def name(self) -> str:
        """``entropy``."""
        return "entropy"

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """- Σ p log p."""
        logarithms = output.log_softmax(dim=1)
        return -(logarithms.exp() * logarithms).sum(dim=1)


@TARGETS.register("contrast")
@dataclass(frozen=True)
class Contrast(Target):
    """Largest output minus the second largest, chosen again at every path point."""

    probabilities: bool = False

    @property
    def name(self) -> str:
        """``contrast``, ``contrast_probability``."""
        return "contrast" + _suffix(self.probabilities)

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """First minus second."""
        if output.shape[1] < 2:
            raise AttributionError("target contrast: the model has one output, a contrast needs two")
        largest = _scores(output, self.probabilities).topk(2, dim=1).values
        return largest[:, 0] - largest[:, 1]


@TARGETS.register("surprisal")
@dataclass(frozen=True, eq=False)
class Surprisal(Target):
    """How unusual the raw outputs are over a data set: ½ (y - μ)ᵀ (Σ + εI)⁻¹ (y - μ), ε = 10⁻⁶ · tr Σ / n.

    Args:
        mean: μ, [outputs].
        covariance: Σ, [outputs, outputs]. Both come from :meth:`fitted`, or are given.
    """

    mean: Float[Tensor, "outputs"] | None = None
    covariance: Float[Tensor, "outputs outputs"] | None = None

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.covariance is None):
            raise AttributionError("target surprisal: give both mean and covariance, or neither")
        precision = None if self.covariance is None else ridged_inverse(self.covariance)
        object.__setattr__(self, "_precision", precision)
        object.__setattr__(self, "_on_device", {})

    @property
    def name(self) -> str:
        """``surprisal``."""
        return "surprisal"

    def fitted(self, statistics: DataStatistics) -> Target:
        """With the moments of the outputs over a data set."""
        return Surprisal(statistics.output_mean, statistics.output_covariance)

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """Check that the moments are there, and of as many outputs."""
        if self.mean is None:
            raise AttributionError("target surprisal: no data set was given: call target.fitted(statistics) before")
        if len(self.mean) != output.shape[1]:
            raise AttributionError(
                f"target surprisal: moments of {len(self.mean)} outputs, the model has {output.shape[1]}"
            )
        return None

    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The surprisal; computed in float64, for Σ may be close to singular."""
        mean, precision = self._moments(output.device)
        deviation = output.double() - mean
        return (0.5 * (deviation @ precision * deviation).sum(dim=1)).to(output.dtype)

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """μ and (Σ + εI)⁻¹ on a device, sent there once."""
        cache: dict[torch.device, tuple[Tensor, Tensor]] = self._on_device  # type: ignore[attr-defined]
        if device not in cache:
            assert self.mean is not None
            cache[device] = self.mean.to(device, torch.float64), self._precision.to(device)  # type: ignore[attr-defined]
        return cache[device]


def _checked_labels(name: str, output: Output, labels: Labels | None) -> Choice:
    """The labels, one column, if each is the number of an output."""
    if labels is None:
        raise AttributionError(f"target {name}: the images come without labels; give labels or another target")
    outside = ((labels < 0) | (labels >= output.shape[1])).nonzero().flatten().tolist()
    if outside:
        label = int(labels[outside[0]])
        cause = "has no label" if label == -1 else f"has the label {label}"
        raise AttributionError(
            f"target {name}: sample {outside[0]} of the batch {cause}, the model has {output.shape[1]} outputs"
        )
    return labels.long()[:, None]


def _scores(output: Output, probabilities: bool) -> Output:
    return output.softmax(dim=1) if probabilities else output


def _suffix(probabilities: bool) -> str:
    return "_probability" if probabilities else ""
