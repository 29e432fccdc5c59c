"""The sum along the path is the trapezoid rule, in pieces, in any memory format, and fused on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from codec_dist.attribution import make_reduction, path_sums
from codec_dist.attribution.path_sums import PIECE, FusedSum, RunningSum, fused_difference, split_path_reference
from codec_dist.models import LayerKey

SHAPES = [(3, 5), (2, 7, 6), (3, 4, 5, 6), (1, 2, 520, 520), (9, 8, 96, 96)]
assert PIECE < 2 * 520 * 520  # more than a piece per sample
CHANNELS = make_reduction(torch.nn.Identity(), LayerKey("x"))


def points(shape: tuple[int, ...], kind: torch.dtype, count: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(len(shape))
    hidden, gradient = ([torch.randn(shape, generator=generator).to(kind) for _ in range(count)] for _ in range(2))
    return hidden, gradient


def obvious(hidden: list[Tensor], gradient: list[Tensor]) -> Tensor:
    """The sum in float64, point by point."""
    pairs = zip(hidden, hidden[1:], gradient, gradient[1:])
    return sum((g.double() + g2.double()) / 2 * (h.double() - h2.double()) for h, h2, g, g2 in pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last_of_one_sample", [False, True])
@pytest.mark.parametrize("sums", [RunningSum, FusedSum])
def test_equals_the_obvious_sum(shape: tuple[int, ...], kind: torch.dtype, last_of_one_sample: bool, sums) -> None:
    hidden, gradient = points(shape, kind)
    if last_of_one_sample:
        hidden[-1], gradient[-1] = hidden[-1][:1], gradient[-1][:1]
    total = sums()
    for h, g in zip(hidden, gradient):
        total.add(h, g)
    expected = obvious(hidden, gradient)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(total.values().double(), expected, **tolerance)
    positions = expected.flatten(2) if len(shape) == 4 else expected.transpose(1, 2) if len(shape) == 3 else None
    wanted = expected.clamp(min=0) if positions is None else positions.clamp(min=0).sum(2)
    torch.testing.assert_close(total.split(CHANNELS)[0].double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total.total().double(), expected.flatten(1).sum(1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("formats", ["channels_last", "mixed", "a view of a view"])
def test_memory_formats_do_not_matter(formats: str) -> None:
    hidden, gradient = points((3, 4, 5, 6), torch.float64)
    expected = obvious(hidden, gradient)
    if formats != "a view of a view":
        hidden = [each.contiguous(memory_format=torch.channels_last) for each in hidden]
    if formats == "channels_last":
        gradient = [each.contiguous(memory_format=torch.channels_last) for each in gradient]
    if formats == "a view of a view":
        hidden = [torch.cat([each, each])[3:].transpose(2, 3).contiguous().transpose(2, 3) for each in hidden]
        gradient = [torch.stack([each, each], dim=-1)[..., 0] for each in gradient]
    total = RunningSum()
    for h, g in zip(hidden, gradient):
        total.add(h, g)
    torch.testing.assert_close(total.values(), expected, rtol=1e-12, atol=1e-12)


KERNEL = """
import torch
from codec_dist.attribution.path_sums import split_path_reference
from codec_dist.attribution.fused_kernel import split_path_fused

torch.manual_seed(0)
CASES = (
    (torch.float32, (3, 40, 7), "channels first"),
    (torch.float32, (2, 5, 600), "last of one sample"),
    (torch.bfloat16, (2, 33, 49), "channels last"),
    (torch.bfloat16, (3, 40, 7), "last of one sample"),
    (torch.float16, (2, 33, 49), "mixed"),
    (torch.float64, (1, 1, 1), "channels first"),
    (torch.float32, (2, 5, 40), "not finite"),
    (torch.float16, (2, 5, 40), "wide gradients"),
)
for kind, shape, layout in CASES:
    hidden = [torch.randn(shape).to(kind) for _ in range(4)]
    gradient = [torch.randn(shape).to(kind) for _ in range(4)]
    if layout == "channels last":
        hidden = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in hidden]
    if layout == "last of one sample":
        hidden[-1], gradient[-1] = hidden[-1][:1].expand(shape), gradient[-1][:1].expand(shape)
    if layout == "wide gradients":
        gradient = [each.float() for each in gradient]
    if layout == "not finite":
        hidden[1][0, 1, 3], gradient[2][1, 4, 2] = float("nan"), float("inf")
    if layout == "mixed":
        hidden[1] = hidden[1].transpose(1, 2).contiguous().transpose(1, 2)
    for fused, plain in zip(split_path_fused(hidden, gradient), split_path_reference(hidden, gradient)):
        assert fused.dtype == plain.dtype == torch.promote_types(kind, torch.float32)
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert layout == "not finite" or fused.abs().sum() > 0 or shape == (1, 1, 1)
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_equals_the_plain_function_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    # The interpreter is chosen when Triton is imported, so it needs a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_plain_function_equals_the_obvious_sum() -> None:
    hidden, gradient = points((2, 7, 6), torch.float64)
    whole = obvious(hidden, gradient)
    positive, negative = split_path_reference(hidden, gradient)
    torch.testing.assert_close(positive, whole.clamp(min=0).sum(2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(negative, whole.clamp(max=0).sum(2), rtol=1e-12, atol=1e-12)


def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, gradient = points((2, 7, 3, 4), torch.float32, count=2)
    path = [(hidden[0], gradient[0]), (hidden[1][:1], gradient[1][:1])]
    assert fused_difference(path, CHANNELS) < 1e-6
    monkeypatch.setattr(
        path_sums,
        "split_path",
        lambda hidden, gradient: tuple(1.25 * x for x in split_path_reference(hidden, gradient)),
    )
    assert fused_difference(path, CHANNELS) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_equals_the_plain_function_on_a_gpu(kind: torch.dtype) -> None:
    from codec_dist.attribution.path_sums import split_path

    hidden, gradient = ([each.cuda() for each in made] for made in points((8, 64, 3136), kind, count=11))
    for fused, plain in zip(split_path(hidden, gradient), split_path_reference(hidden, gradient)):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-2)
