"""The model that is explained: what two images show of it, and its fastest form that computes the same numbers."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from codec_dist.attribution.batch import LayerSettings
from codec_dist.attribution.capture import Capture, Captured, find_cuts
from codec_dist.attribution.errors import AttributionError
from codec_dist.attribution.fast_model import FoldPair, find_foldable, laid_out, prepared, unwatched
from codec_dist.attribution.image_memory import Footprint, measure_image
from codec_dist.attribution.path_sums import can_fuse, fused_difference
from codec_dist.attribution.reductions import make_reduction
from codec_dist.attribution.self_check import Optimizations, SelfCheck, fastest_agreeing
from codec_dist.attribution.tracing import AxisTrace
from codec_dist.models import LayerKey

Images = Float[Tensor, "batch ..."]

logger = logging.getLogger(__name__)

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# How far the fused kernel's contributions may be from plain operations', relative to their norm.
FUSED_TOLERANCE = 1e-3


class ExplainedModel:
    """A model and some of its layers; :meth:`inspect` finds out what it is like.

    Args:
        module: the model, in any state; left as found.
        keys: the layers.
        settings: what is wanted of every layer; gets the reductions and cut layers that are found.
        optimizations: what may make the model faster.
        checked: whether it is known that they leave its numbers as they are.
        autocast: the narrow type in which it computes, if any.
        allow_random: accept a network that draws random numbers in evaluation mode.
        allow_mixing: accept a network in which the images of a batch influence each other.

    Attributes:
        channels: channels of each layer, empty before :meth:`inspect`.
        optimizations: those that are used.
        left_out: for each optimisation that was switched off, how the model's numbers differ with it.
        footprint: the memory that an image takes.
    """

    def __init__(
        self,
        module: nn.Module,
        keys: Sequence[LayerKey],
        settings: LayerSettings,
        optimizations: Optimizations,
        *,
        checked: bool,
        autocast: str | None,
        allow_random: bool,
        allow_mixing: bool,
    ) -> None:
        self.module, self.keys = module, keys
        self.optimizations = optimizations
        self.channels: dict[str, int] = {}
        self.left_out: dict[str, str] = {}
        self.footprint = Footprint(0, 0, 0)
        self._settings, self._checked = settings, checked
        self._autocast = autocast
        self._allow_random, self._allow_mixing = allow_random, allow_mixing
        self._capture = Capture(module, keys, keep_inplace=optimizations.inplace)
        self._pairs: tuple[FoldPair, ...] = ()
        if not allow_mixing:
            _refuse_batch_statistics(module)

    def copy(self) -> "ExplainedModel":
        """What is found out of the one from now on is not known of the other."""
        return copy.copy(self)

    @property
    def narrow(self) -> torch.dtype | None:
        """The narrow type in which the model computes; None: its own."""
        return AUTOCAST[self._autocast] if self._autocast else None

    def layout(self, images: Images) -> torch.memory_format:
        """The memory format in which images pass."""
        return _layout(self.optimizations, images)

    @contextmanager
    def running(self) -> Iterator[Callable[[Images], Captured]]:
        """A function that runs the model in its fastest form, and gives its output and hidden tensors."""
        with self._form(self._capture, self.optimizations) as run:
            yield run

    def inspect(self, images: Images) -> None:
        """Find out what the model is like from two images.

        Raises:
            AttributionError: as :meth:`codec_dist.attribution.Attributor.probe`.
        """
        with self._capture as capture:
            # Two images: a tensor that does not grow with the batch has no row for each.
            with torch.no_grad(), AxisTrace(self.module, images) as trace:
                hidden = capture(images).hidden
            self._settings.reductions = {
                key: make_reduction(self.module, key, trace.of(hidden[key.site])) for key in self.keys
            }
            channels = {str(key): self._settings.reduce(key, hidden[key.site], 2)[0].shape[1] for key in self.keys}
            self._settings.cuts = find_cuts(capture, images[:1])
            if self.optimizations.fold_batchnorm:
                self._pairs = find_foldable(capture, images[:1])
            self.footprint = measure_image(capture, images[:1])
        if not self._checked:
            self._check(images)
        self.channels = channels

    @contextmanager
    def _form(self, capture: Capture, optimizations: Optimizations) -> Iterator[Callable[[Images], Captured]]:
        """A function that runs the model with some optimisations, and gives its output and hidden tensors."""
        first = next(self.module.parameters(), None)
        wide = first is not None and first.dtype == torch.float64
        pairs = unwatched(capture, self._pairs) if optimizations.fold_batchnorm else ()
        with capture, prepared(self.module, pairs, optimizations.channels_last and not wide, self.narrow):
            # However the images lay in memory: another layout may give other last bits, or wrong gradients.
            yield lambda images: capture(laid_out(images, _layout(optimizations, images)))

    def _check(self, images: Images) -> None:
        """Find out which optimisations leave this model's numbers as they are, and whether it can be explained."""
        check = SelfCheck(self.module, self._capture.sites, images, self.narrow)
        if (seen := check.randomness()) is not None:
            if not self._allow_random:
                raise AttributionError(
                    f"the network is random in evaluation mode: {seen}: let its dropout follow the mode "
                    "(F.dropout needs training=self.training), or set attribution.allow_random to explain it as it is"
                )
            # What differs from pass to pass cannot be compared.
            self._use(Optimizations(inplace=False, fold_batchnorm=False, channels_last=False, fused=False), {})
            return
        disagreement = partial(self._disagreement, check)
        agreed, left_out = self.optimizations, dict[str, str]()
        if disagreement(agreed) is not None:
            if (seen := check.find_mixing()) is not None and not self._allow_mixing:
                raise AttributionError(
                    f"the network mixes the images of a batch: {seen}: use one that treats each image by itself in "
                    "evaluation mode, or set attribution.allow_mixing to explain it as it is"
                )
            agreed, left_out = fastest_agreeing(agreed, disagreement)
        if agreed.fused and can_fuse(images.device):
            difference = max(
                fused_difference(check.points(key.site), each) for key, each in self._settings.reductions.items()
            )
            if difference > FUSED_TOLERANCE:
                left_out["fused"] = f"contributions differ by {100 * difference:.2g} %"
                agreed = replace(agreed, fused=False)
        self._use(agreed, left_out)

    def _disagreement(self, check: SelfCheck, optimizations: Optimizations) -> str | None:
        same = optimizations.inplace == self.optimizations.inplace
        capture = self._capture if same else Capture(self.module, self.keys, keep_inplace=optimizations.inplace)
        return check.disagreement(lambda: self._form(capture, optimizations))

    def _use(self, optimizations: Optimizations, left_out: Mapping[str, str]) -> None:
        for name, reason in left_out.items():
            logger.warning("%s is switched off for this model: with it %s", name, reason)
        if optimizations.inplace != self.optimizations.inplace:
            self._capture = Capture(self.module, self.keys, keep_inplace=optimizations.inplace)
        self.optimizations, self.left_out = optimizations, dict(left_out)


def _layout(optimizations: Optimizations, images: Images) -> torch.memory_format:
    fit = images.ndim == 4 and images.dtype != torch.float64
    return torch.channels_last if optimizations.channels_last and fit else torch.contiguous_format


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise AttributionError(
                f"module {name} normalises over the batch also in evaluation mode (no running statistics): "
                "contributions of one image would depend on the others; set attribution.allow_mixing to explain it as "
                "it is"
            )
