"""A model whose hidden tensor at one layer is replaced by pairs of images and channel masks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from codec_dist.attribution import Capture, edited
from codec_dist.attribution.cuts import find_cuts
from codec_dist.interventions.contexts import ChannelLayout
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.grouping import Groups

# How far the output may differ when the layers before the changed one are shared; rounding stays far below.
SHARING_TOLERANCE = 1e-3


class _LayerReached(Exception):  # noqa: N818 (it stops a forward pass; nothing went wrong)
    """Carries the hidden tensor out of a forward pass that need not go on."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class ChangedModel:
    """A borrowed model that answers for (image, mask) pairs of one batch of images at a time."""

    def __init__(self, model: nn.Module, layer: str, groups: Groups, images: Tensor) -> None:
        self._model, self._layer = model, layer
        self._layout = ChannelLayout(model, layer)
        self._parameter = next(model.parameters(), images)
        self._images = self._hidden = images[:0]
        self._channels = groups.channels
        self._shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self._parameter.device)
        first = self.prepared(images[:1])
        self._layout.learn(first)
        self._shared = self._is_cut(first)
        with torch.inference_mode():
            self._check(first, groups)
            self._shared = self._shared and self._can_share(self.prepared(images[[0, -1]]))

    def prepared(self, images: Tensor) -> Tensor:
        """On the model's device, in its type."""
        return images.to(self._parameter.device, self._parameter.dtype, non_blocking=True)

    @contextmanager
    def batch(self, images: Tensor) -> Iterator[None]:
        """While open, pairs are of these images."""
        self._images = images
        self._hidden = self._reach(images) if self._shared else images[:0]
        try:
            yield
        finally:
            self._images = self._hidden = images[:0]

    def __call__(self, rows: Int[Tensor, "pairs"], masks: Int[Tensor, "pairs"]) -> Float[Tensor, "pairs classes"]:
        """The model's output for images of the batch, each with the channels of one mask."""
        factors = self._factors(masks)
        if self._shared:
            return self._resume(self._images[:1], self._hidden, rows, factors)

        def edit(hidden: Tensor) -> Tensor:
            return hidden * self._layout.spread(factors, hidden, 1.0)

        with edited(self._model, {self._layout.key: edit}):
            return self._model(self._images.index_select(0, rows))

    def _factors(self, masks: Int[Tensor, "pairs"]) -> Float[Tensor, "pairs channels"]:
        """1 where a channel stays, 0 elsewhere. Unpacked when needed: as numbers, all masks could fill the memory."""
        bits = (self._packed.index_select(0, masks)[:, :, None] >> self._shifts) & 1
        return bits.flatten(1)[:, : self._channels].to(self._images.dtype)

    def _reach(self, images: Tensor) -> Tensor:
        """Run the model up to the layer."""

        def stop(hidden: Tensor) -> Tensor:
            raise _LayerReached(hidden)

        try:
            with edited(self._model, {self._layout.key: stop}):
                self._model(images)
        except _LayerReached as reached:
            return reached.hidden
        raise InterventionError(f"layer {self._layer} was not reached: the forward pass never calls its module")

    def _resume(self, image: Tensor, hidden: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
        """Run the model on one image, with pairs of other images' hidden tensors and masks in place of its own."""

        def edit(current: Tensor) -> Tensor:
            selected = hidden.index_select(0, rows)
            return selected.mul_(self._layout.spread(factors, selected, 1.0))

        with edited(self._model, {self._layout.key: edit}):
            return self._model(image)

    def _is_cut(self, image: Tensor) -> bool:
        with torch.inference_mode(False), torch.enable_grad(), Capture(self._model, [self._layout.key]) as capture:
            return find_cuts(capture, image.clone())[self._layout.key.site]

    def _check(self, image: Tensor, groups: Groups) -> None:
        channels = self._layout.count(self._reach(image))
        if channels != groups.channels:
            raise InterventionError(
                f"conditions for {groups.channels} channels cannot be run at {self._layer}: it has {channels}"
            )
        outputs = self._model(image).shape[1]
        if groups.classes[-1] >= outputs or groups.classes[0] < 0:
            wrong = groups.classes[-1] if groups.classes[-1] >= outputs else groups.classes[0]
            raise InterventionError(f"a condition needs class {wrong}: the model has {outputs} classes, from 0")
        self._packed = torch.from_numpy(groups.masks).to(image.device)

    def _can_share(self, images: Tensor) -> bool:
        """Whether another batch size may begin at the layer: some models remember that of their input."""
        direct, hidden = self._model(images), self._reach(images)
        rows = torch.arange(len(images), device=images.device)
        try:
            resumed = self._resume(images[:1], hidden, rows, images.new_ones(2, self._channels))
        except (AssertionError, IndexError, RuntimeError, ValueError):
            return False
        limit = SHARING_TOLERANCE * direct.abs().max()
        return resumed.shape == direct.shape and bool(((resumed - direct).abs() <= limit).all())
