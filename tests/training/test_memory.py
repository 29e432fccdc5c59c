"""How much memory rows may take is what the machine has free, divided by the ranks on it."""

import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch

from codec_dist.training.collectives import Ranks
from codec_dist.training.row_memory import FRACTION_FOR_ROWS, bytes_for_rows, failed_allocation
from codec_dist.utils import available_memory


def test_ranks_on_one_host_share_its_memory() -> None:
    ranks = Ranks()
    ranks.on_this_host = 4
    # What is free changes between two looks at it.
    expected = available_memory() * FRACTION_FOR_ROWS / 4
    assert 0.5 * expected < bytes_for_rows(ranks) < 2 * expected


def _raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def _too_large_for_torch() -> object:
    return torch.empty(1 << 58)


def _too_large_for_numpy() -> object:
    return np.empty(1 << 58)


def _too_large_for_python() -> object:
    return bytearray(1 << 60)


@pytest.mark.parametrize("allocate", [_too_large_for_torch, _too_large_for_numpy, _too_large_for_python])
def test_a_rank_without_memory_is_known_by_its_text(allocate: Callable[[], object]) -> None:
    error = _raised(allocate)
    # As Ray Train hands it on: the stack as text.
    text = "".join(traceback.format_exception(error))
    line = failed_allocation([RuntimeError("a rank was ended"), RuntimeError(text)])
    assert line is not None
    assert type(error).__name__ in line
    assert "\n" not in line


def test_a_gpu_without_memory_is_told_without_torchs_account_of_it() -> None:
    # Of torch 2.8, on a GPU that was full.
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.12 GiB is "
        "free. Of the allocated memory 130.20 GiB is allocated by PyTorch, and 1.02 GiB is reserved by PyTorch but "
        "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:"
    )
    line = failed_allocation([error])
    assert line is not None
    assert "2.00 GiB" in line
    assert "PYTORCH_ALLOC_CONF" not in line


def test_other_errors_of_ranks_are_not_taken_for_a_lack_of_memory() -> None:
    assert failed_allocation([ValueError("a shape is wrong"), ConnectionError("the process was ended")]) is None
