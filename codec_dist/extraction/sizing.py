"""How much memory an extraction actor needs for a microbatch, and the largest microbatch that a budget affords."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from codec_dist.attribution import Attributor
from codec_dist.config import Config
from codec_dist.models import LoadedModel
from codec_dist.shards import ShardInfo

# More than so many images at once gain nothing on a CPU, and little on a GPU.
LARGEST_MICROBATCH = 64

# A process with torch, timm, Ray and Arrow before it has a model: 1.0 to 1.1 GB were measured at rest, much of it
# libraries that the actors of a node share.
PROCESS_BYTES = 1 << 30
# Context and workspaces of CUDA.
CONTEXT_BYTES = 1 << 30
# The model while it is loaded, its weights hashed and brought into another order.
COPIES_OF_MODEL = 4
# Shards whose images are decoded, or whose rows are held, at the same time.
SHARDS_AT_ONCE = 2
# Rows of a shard as computed, and a copy while they are written.
COPIES_OF_ROWS = 2
# Microbatches of images beside those that wait: computed, finished but not yet taken, and being made (twice).
BATCHES_IN_THE_MAKING = 4

# Where steps are chosen by measuring, and all points of the path are kept until their sum is taken.
ASSUMED_STEPS = 64


@dataclass(frozen=True)
class Needs:
    """Bytes of one kind of memory that an actor takes, as a function of its microbatch."""

    fixed: int
    per_image: int

    def bytes(self, microbatch: int) -> int:
        """All that an actor takes with so many images at once."""
        return self.fixed + self.per_image * microbatch

    def largest(self, budget: int) -> int:
        """The largest power of two, at least 1 and at most 64, whose need is within the budget.

        Powers of two, so that a little more or less of free memory rarely changes the number, on which the last
        bits of results depend.
        """
        microbatch = LARGEST_MICROBATCH
        while microbatch > 1 and self.bytes(microbatch) > budget:
            microbatch //= 2
        return microbatch


@dataclass(frozen=True)
class ActorNeeds:
    """What an actor takes of its node's memory, and of its GPU's (None on CPUs)."""

    host: Needs
    device: Needs | None = None


def measure_needs(
    config: Config, shards: Sequence[ShardInfo], loaded: LoadedModel, attributor: Attributor, steps: int | None
) -> dict[str, ActorNeeds]:
    """The needs of an actor on a CPU and on a GPU, by ``cpu`` and ``cuda``.

    What a pass through the model needs was measured by the attributor on one image (see
    :meth:`Attributor.bytes_per_image`); the rest is counted. ``python -m benchmarks.memory`` compares it with real
    processes.

    Args:
        config: the whole config.
        shards: all shards of the data.
        loaded: the model.
        attributor: for this config, after its first call.
        steps: of the path; None: they are chosen later.
    """
    tensors = {*loaded.module.parameters(), *loaded.module.buffers()}
    model = COPIES_OF_MODEL * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    size = np.dtype(config.attribution.dtype).itemsize
    pixels = math.prod(loaded.preprocessing.shape)
    waiting = SHARDS_AT_ONCE * (config.data.prefetch + BATCHES_IN_THE_MAKING) * pixels * torch.float32.itemsize
    targets = 1 + len(config.attribution.further_targets)
    quantities = 2 * (targets + config.attribution.activations + config.attribution.gradients)
    largest = max(shard.samples for shard in shards)
    rows = SHARDS_AT_ONCE * COPIES_OF_ROWS * largest * sum(attributor.channels.values()) * quantities * size
    at_rest = Needs(PROCESS_BYTES + model + rows, waiting)
    adaptive = getattr(attributor.method, "adaptive", None)
    most = steps or max(ASSUMED_STEPS, adaptive.most if adaptive is not None else 0)
    passing, on_gpu = (attributor.bytes_per_image(device, steps=most) for device in ("cpu", "cuda"))
    return {
        "cpu": ActorNeeds(Needs(at_rest.fixed, waiting + passing)),
        "cuda": ActorNeeds(at_rest, Needs(CONTEXT_BYTES + model, on_gpu)),
    }
