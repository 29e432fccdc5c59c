"""Targets: the scalar T(x) of the output that contributions explain (METHOD: "Targets")."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from codec_dist.attribution.errors import AttributionError, require_whole
from codec_dist.utils import Registry

Output = Float[Tensor, "batch outputs"]
Scalar = Float[Tensor, "batch"]
Labels = Int[Tensor, "batch"]
Choice = Int[Tensor, "batch chosen"]


class Target(ABC):
    """A scalar of the output per sample.

    A target may choose outputs once per sample, at the image itself, and keep them along the path.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """A label that is safe in paths, such as ``top_1``."""

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """Outputs chosen for each sample from the output at the image; None: the same rule at every point."""
        del output, labels
        return None

    @abstractmethod
    def value(self, output: Output, choice: Choice | None) -> Scalar:
        """The target [batch] of ``output`` [batch, outputs], differentiable."""


TARGETS: Registry[Target] = Registry("target", AttributionError)


@TARGETS.register("top_k")
@dataclass(frozen=True)
class TopK(Target):
    """Sum of the k largest outputs, chosen anew at every path point (the paper's), or ``frozen`` at the image."""

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
    def name(self) -> str:
        """``label``, ``label_probability``."""
        return "label" + _suffix(self.probabilities)

    def choose(self, output: Output, labels: Labels | None) -> Choice | None:
        """The labels."""
        if labels is None:
            raise AttributionError("target label: the images come without labels; give labels or another target")
        outside = ((labels < 0) | (labels >= output.shape[1])).nonzero().flatten().tolist()
        if outside:
            label = int(labels[outside[0]])
            cause = "has no label" if label == -1 else f"has the label {label}"
            raise AttributionError(
                f"target label: sample {outside[0]} of the batch {cause}, the model has {output.shape[1]} outputs"
            )
        return labels.long()[:, None]

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
    """Largest output minus the second largest, chosen anew at every path point."""

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


def _scores(output: Output, probabilities: bool) -> Output:
    return output.softmax(dim=1) if probabilities else output


def _suffix(probabilities: bool) -> str:
    return "_probability" if probabilities else ""
