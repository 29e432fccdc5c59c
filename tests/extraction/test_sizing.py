"""The microbatch is the largest power of two, up to 64, that fits into every actor's share of memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from codec_dist.attribution import Attributor, IntegratedGradients
from codec_dist.cluster_runtime import MemoryShare
from codec_dist.extraction.microbatch import choose_microbatch, describe_needs
from codec_dist.extraction.sizing import ActorNeeds, Needs

GB = 10**9


def share(host: int, device: int | None = None) -> MemoryShare:
    return MemoryShare(node="10.0.0.1", actors=4, host_bytes=host, device_bytes=device)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(100 * GB, 64), (11 * GB, 64), (GB + 64 * GB // 10 - 1, 32), (2 * GB, 8), (GB, 1), (0, 1)],
)
def test_the_largest_that_fits_is_chosen(budget: int, expected: int) -> None:
    needs = ActorNeeds(Needs(fixed=GB, per_image=GB // 10))
    assert choose_microbatch(needs, [share(100 * GB), share(budget)]) == expected


def test_on_gpus_both_kinds_of_memory_count_and_unknown_ones_do_not() -> None:
    needs = ActorNeeds(Needs(GB, GB // 100), Needs(GB, GB))
    assert choose_microbatch(needs, [share(100 * GB, 20 * GB), share(100 * GB, None)]) == 16
    assert choose_microbatch(needs, [share(100 * GB, None)]) == 64
    assert choose_microbatch(needs, [share(GB + GB // 10, 90 * GB)]) == 8
    assert choose_microbatch(needs, []) == 64


@given(st.integers(0, 2**36), st.integers(1, 2**32), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_no_share_is_exceeded_where_one_image_fits(fixed: int, per_image: int, budgets: list[int]) -> None:
    needs = ActorNeeds(Needs(fixed, per_image))
    chosen = choose_microbatch(needs, [share(budget) for budget in budgets])
    assert chosen in (1, 2, 4, 8, 16, 32, 64)
    assert chosen == 1 or needs.host.bytes(chosen) <= min(budgets)
    assert chosen == 64 or needs.host.bytes(2 * chosen) > min(budgets)


def test_what_is_more_than_a_share_comes_with_what_to_do() -> None:
    needs = ActorNeeds(Needs(GB, GB // 10))
    assert "cluster.actors" in describe_needs(needs, [share(GB)], 64)
    assert "lower" not in describe_needs(needs, [share(90 * GB)], 64)


def test_what_an_image_takes_is_what_autograd_keeps_and_the_hidden_tensors() -> None:
    """A stack of linear layers, counted by hand: inputs of the products, and h and g at two points with their sum."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(1000, 1000, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(1000, 10, bias=False))
    attributor = Attributor(model, ["1", "3"], IntegratedGradients(4, points="uniform"))
    attributor.probe(torch.zeros(1, 1000))
    # Kept from the first chosen layer on: outputs of two tanh; the image itself; two hidden tensors, five times.
    watched, kept = 2 * 4000, 2 * 4000 + 4000
    found = attributor.bytes_per_image("cpu") / 1.3
    assert kept + 5 * watched - 4000 <= found <= kept + 5 * watched + 3 * 4000
    # A GPU keeps h and g of all points of the path until its kernel reads them.
    on_gpu = attributor.bytes_per_image("cuda") / 1.3
    assert on_gpu - found == pytest.approx((2 * 5 - 5) * watched, abs=2)
    assert attributor.bytes_per_image("cuda", steps=20) > 3 * on_gpu
