"""Memory: a budget decides the microbatch, too little of it halves the microbatch, and steps do not cost any."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

from codec_dist.attribution import AttributionError, Attributor, Capture, IntegratedGradients, Rank, TopK
from codec_dist.attribution.image_memory import measure_image
from codec_dist.models import resolve_layers

Pair = tuple[nn.Module, Tensor]


def test_a_budget_in_bytes_decides_the_microbatch(cnn: Pair) -> None:
    model, images = cnn
    with torch.enable_grad(), Capture(model, resolve_layers(model, ["blocks"])) as capture:
        one = measure_image(capture, images[:1]).bytes()
        assert measure_image(capture, images).bytes() > 2.5 * one  # three images
    attributor = Attributor(model, ["blocks"], memory=14 * one)
    attributor(images)
    assert 8 <= attributor.microbatch <= 12
    tight = Attributor(model, ["blocks"], memory=1)
    expected = Attributor(model, ["blocks"])(images)
    for layer, found in tight(images).items():
        torch.testing.assert_close(found.positive, expected[layer].positive)
    assert tight.microbatch == 1


def test_more_targets_leave_room_for_fewer_images(cnn: Pair) -> None:
    model, images = cnn
    sizes = []
    for targets in ([TopK(1)], [TopK(1), Rank(2), Rank(3), Rank(4)]):
        attributor = Attributor(model, ["blocks"], target=targets, memory=20_000_000)
        attributor(images)
        sizes.append(attributor.microbatch)
    assert sizes[1] < 0.8 * sizes[0]


def test_a_microbatch_is_gone_before_the_next_is_computed(cnn: Pair) -> None:
    model, images = cnn
    alive: list[int] = []
    held: list[weakref.ref] = []

    class Watched(IntegratedGradients):
        def contributions(self, images, at_images, evaluation):
            alive.append(sum(reference() is not None for reference in held))
            found = super().contributions(images, at_images, evaluation)
            held.extend(weakref.ref(total) for each in found.totals for total in each.values())
            return found

    Attributor(model, ["blocks"], Watched(2), microbatch=1)(images)
    assert alive == [0, 0, 0]


def test_what_an_image_needs_grows_with_its_area(cnn: Pair) -> None:
    model, _ = cnn
    with torch.enable_grad(), Capture(model, resolve_layers(model, ["blocks"])) as capture:
        small, large = (measure_image(capture, torch.randn(1, 3, size, size)).bytes() for size in (16, 32))
    assert 3.5 < large / small < 4.1


@pytest.mark.parametrize("memory", [0, -5, 0.0, 1.5, True, "1GB"])
def test_odd_budgets_are_refused(cnn: Pair, memory, monkeypatch: pytest.MonkeyPatch) -> None:
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without type checks
    with pytest.raises(AttributionError, match="memory is"):
        Attributor(cnn[0], ["blocks"], memory=memory)


class Greedy(nn.Module):
    """Has no memory for more than four images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if len(images) > 4:
            torch.empty(1 << 60)  # the allocator of the CPU refuses in its own words
        return self.model(images)


def test_too_little_memory_halves_the_microbatch_and_goes_on(cnn: Pair) -> None:
    model, _ = cnn
    images = torch.randn(19, 3, 16, 16)
    greedy = Greedy(model)
    attributor = Attributor(greedy, ["blocks"], IntegratedGradients(2, points="uniform"))
    found, expected = (
        attributor(images),
        Attributor(model, ["blocks"], IntegratedGradients(2, points="uniform"))(images),
    )
    assert attributor.microbatch == 4
    assert max(greedy.sizes) == 19
    for layer in expected:
        torch.testing.assert_close(found[f"model.{layer}"].positive, expected[layer].positive, rtol=1e-4, atol=1e-5)
    greedy.sizes.clear()
    attributor(images)
    assert max(greedy.sizes) == 4  # it is not tried again


def test_a_large_batch_passes_through_a_cpu_in_equal_parts_of_small_tensors() -> None:
    sizes: list[int] = []
    # 4 MB per image, so at most 8 images; the last layer is small.
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    attributor = Attributor(model, ["1"], IntegratedGradients(1))
    images = torch.randn(10, 3, 128, 128)
    attributor.probe(images)
    sizes.clear()
    found = attributor(images)["1"].positive
    assert max(sizes) == 5
    together = Attributor(model, ["1"], IntegratedGradients(1), microbatch=10)(images)["1"].positive
    torch.testing.assert_close(found, together)


def test_where_halving_is_not_wanted_too_little_memory_is_an_error(cnn: Pair) -> None:
    images = torch.randn(9, 3, 16, 16)
    with pytest.raises(AttributionError, match=r"memory of the cpu is too small for \d+ images at once: lower"):
        Attributor(Greedy(cnn[0]), ["blocks"], halve=False)(images)


def test_another_error_is_not_taken_for_too_little_memory(cnn: Pair) -> None:
    model, images = cnn
    model.head = nn.Linear(5, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        Attributor(model, ["blocks"])(images)


PEAK = """
import sys
import torch
from codec_dist.attribution import Attributor, IntegratedGradients
from torchvision.models.resnet import Bottleneck, ResNet

torch.manual_seed(0)
torch.set_num_threads(1)
model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10)
images = torch.randn(8, 3, 64, 64)
attributor = Attributor(model, ["blocks"], IntegratedGradients(int(sys.argv[1]), points="uniform"), microbatch=8)
attributor.probe(images)
attributor(images)
# getrusage would count the parent's memory, too.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_steps() -> None:
    def peak(steps: int) -> int:
        command = [sys.executable, "-c", PEAK, str(steps)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    # After some steps, by when the allocator has what it needs.
    few, many = peak(12), peak(40)
    hidden = 8 * 4 * (256 * 16**2 + 512 * 8**2 + 1024 * 4**2 + 2048 * 2**2) / 1024  # of one point, in KiB
    # 28 points more, each with h and g, would be 56 times as much.
    assert many - few < 5 * hidden, (few, many, hidden)
