"""How many images may pass through a model at once, and what to do when they were too many."""

import errno
import math
import os
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from codec_dist.attribution.capture import Capture
from codec_dist.attribution.errors import AttributionError
from codec_dist.utils import tells_of_failed_allocation

# What is measured leaves out the workspaces of convolutions and the fragments of the allocator.
SPARE_FACTOR = 1.3

# Without a microbatch or a budget, as many path points pass together as fill so much. Measured on one core of a CPU: a
# ResNet-18 with 16 images of 64² (35 MB) gains a quarter from 7 points at a time, with 4 of 224² (104 MB) a tenth.
FILL_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}

# glibc gives every freed tensor above this size back to the system, which hands it out again page by page, filled with
# zeros. So on a CPU a large batch is cut until its tensors are smaller. ResNet-50 with 16 images of 224², S = 3, on two
# cores (medians of 3): 3.86 s at once, 3.60 s as two eights, 3.98 s as four fours, 4.76 s as eight twos.
RECYCLED_BYTES = {"cpu": 1 << 25}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory, or an error's cause is that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # The CPU's allocator and the libraries of a GPU have no class of their own.
    recognised = isinstance(error, RuntimeError) and tells_of_failed_allocation(str(error))
    return recognised or (error.__cause__ is not None and is_out_of_memory(error.__cause__))


def check_budget(memory: object) -> None:
    """Refuse a budget that is neither bytes nor a fraction.

    Raises:
        AttributionError: it is not.
    """
    whole = isinstance(memory, int) and not isinstance(memory, bool) and memory > 0
    if not whole and not (isinstance(memory, float) and 0 < memory <= 1):
        raise AttributionError(f"memory is {memory!r}: give bytes as a whole number, or a fraction from 0.0 to 1.0")


def affordable(memory: int | float, device: torch.device, bytes_per_image: int) -> int:
    """The number of images that a budget affords, at least one.

    Args:
        memory: bytes, or a fraction of all memory of ``device``.
        device: where the model is.
        bytes_per_image: see :class:`Footprint`.
    """
    budget = memory if isinstance(memory, int) else memory * _device_memory(device)
    return max(1, int(budget / (SPARE_FACTOR * bytes_per_image)))


@dataclass(frozen=True)
class Footprint:
    """Bytes that one image needs.

    Attributes:
        kept: what autograd keeps of a forward pass, and the image itself.
        watched: the hidden tensors of the chosen layers.
        widest: the largest tensor of these.
    """

    kept: int
    watched: int
    widest: int

    def bytes(self, targets: int = 1, kept_points: int = 0) -> int:
        """All that one image needs.

        Args:
            targets: number of targets; each has gradients and sums of its own.
            kept_points: points of the path whose h and g are kept until the end, as the fused kernel needs; 0:
                h and g of two points, and the sum.
        """
        tensors = kept_points * (1 + targets) if kept_points else 2 + 3 * targets
        return self.kept + self.watched * tensors

    def recycled(self, device: torch.device) -> int | None:
        """Images at once, at least one, whose tensors' memory can be used again; None: any number."""
        limit = RECYCLED_BYTES.get(device.type)
        return limit and max(1, limit // max(1, self.widest))


def evenly(images: int, largest: int | None) -> int:
    """Images of each microbatch where none is given: parts as equal as may be, none above ``largest``."""
    return images if largest is None else math.ceil(images / math.ceil(images / largest))


def measure_image(capture: Capture, image: Float[Tensor, "one ..."]) -> Footprint:
    """What one image needs, by a forward pass.

    Args:
        capture: open, with the layers that are watched.
        image: one image on the model's device.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in capture.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:  # sparse tensors, such as of a fixed graph, are parts of the model
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _, hidden = capture(image)
    watched = [tensor.numel() * tensor.element_size() for tensor in hidden.values()]
    itself = image.numel() * image.element_size()
    return Footprint(sum(kept.values()) + itself, sum(watched), max(*kept.values(), *watched, itself))


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
