"""The engine's self-check travels to a process with the device that computes, and says what is wrong there."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from ray.cloudpickle import dumps, loads

from codec_dist.config import Config
from codec_dist.extraction import ExtractionError
from codec_dist.extraction.calibration import CheckOnDevice
from codec_dist.extraction.plan import make_plan

MakeConfig = Callable[..., Config]


def test_the_check_finds_elsewhere_what_the_plan_found_here(make_config: MakeConfig) -> None:
    plan, shards = make_plan(make_config())
    check = loads(dumps(CheckOnDevice(plan, shards, "cpu")))
    found = loads(dumps(check(None)))
    assert found.optimizations == plan.optimizations
    assert not found.left_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_cannot_use_is_said_before_any_actor_starts(make_config: MakeConfig) -> None:
    plan, shards = make_plan(make_config())
    with pytest.raises(ExtractionError, match="CUDA build"):
        CheckOnDevice(plan, shards, "cuda")(None)


def test_a_device_that_cannot_run_the_model_is_named(make_config: MakeConfig) -> None:
    plan, shards = make_plan(make_config())
    # Tensors of this device hold no values: the first that is looked at is an error.
    with pytest.raises(ExtractionError, match="meta"):
        CheckOnDevice(dataclasses.replace(plan), shards, "meta")(None)
