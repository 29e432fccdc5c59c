"""The attribution engine against the least that its arithmetic can cost, and against the obvious way.

Three contenders, interleaved so that a noisy machine cannot favour one:

- bare: S forward passes and input gradients of the frozen model (channels_last, in evaluation mode), nothing
  captured and nothing reduced. This is the floor.
- engine: `codec_dist.attribution.Attributor`, integrated gradients of all chosen layers.
- naive: S + 1 passes with weight gradients, every hidden tensor and gradient of every step moved to the host
  and kept, multiplied and reduced at the end (a stand-in for research code). Left out with --no-naive.

Prints a table for people and one JSON line for machines. `ratio` is a contender's median time over bare's.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from codec_dist.attribution import AttributionResult, Attributor, IntegratedGradients
from codec_dist.config import ModelSection
from codec_dist.models import load_model, resolve_layers


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    torch.manual_seed(0)
    values = [0.5] * arguments.channels
    preprocessing = {"size": arguments.size, "channels": arguments.channels, "mean": values, "std": values}
    section = ModelSection.model_validate({"spec": arguments.model, "weights": "none", "preprocessing": preprocessing})
    model = load_model(section).module.to(arguments.device)
    images = torch.randn(arguments.batch, arguments.channels, arguments.size, arguments.size, device=arguments.device)
    attributor = Attributor(model, arguments.layers, IntegratedGradients(arguments.steps))
    contenders: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_loop(model, images, arguments.steps),
        "engine": lambda: attributor(images),
    }
    if arguments.naive:
        contenders["naive"] = lambda: naive_contributions(model, arguments.layers, images, arguments.steps)
    seconds = _interleaved(contenders, arguments.rounds, arguments.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "benchmark": "attribution",
        "model": arguments.model,
        "layers": len(attributor.layers),
        "batch": arguments.batch,
        "size": arguments.size,
        "steps": arguments.steps,
        "device": _device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "images_per_second": {name: round(arguments.batch / median, 2) for name, median in medians.items()},
        "ratio_to_bare": {name: round(median / medians["bare"], 3) for name, median in medians.items()},
    }
    if arguments.naive:
        result["relative_error"] = _worst_error(model, attributor(images), arguments, images)
    _print_table(seconds, arguments.batch)
    print(json.dumps(result))


def bare_loop(model: nn.Module, images: Tensor, steps: int) -> None:
    """S forward passes and gradients to the input of the largest output."""
    images = images.contiguous(memory_format=torch.channels_last)
    for step in range(1, steps + 1):
        point = (images * (step / steps)).requires_grad_()
        torch.autograd.grad(model(point).amax(dim=1).sum(), point)


def naive_contributions(model: nn.Module, layers: list[str], images: Tensor, steps: int) -> dict[str, Tensor]:
    """Net contributions per channel, by keeping everything of every step on the host."""
    names = [key.module for key in resolve_layers(model, layers)]
    modules = dict(model.named_modules())
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            captured[name] = output
            output.retain_grad()
            # What follows may work in place.
            return output.clone()

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    hidden: dict[str, list[Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for step in range(steps + 1):
            model.zero_grad()
            model(images * (step / steps)).amax(dim=1).sum().backward()
            for name in names:
                gradient = captured[name].grad
                assert gradient is not None
                hidden[name].append(captured[name].detach().cpu())
                gradients[name].append(gradient.cpu())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    contributions = {}
    for name in names:
        h, g = torch.stack(hidden[name]), torch.stack(gradients[name])
        total = (0.5 * (g[1:] + g[:-1]) * (h[1:] - h[:-1])).sum(dim=0)
        contributions[name] = total.flatten(2).sum(dim=2) if total.ndim == 4 else total.sum(dim=1)
    return contributions


def _worst_error(model: nn.Module, result: AttributionResult, arguments: argparse.Namespace, images: Tensor) -> float:
    """Largest relative norm, over layers, of engine minus naive net contributions."""
    errors = []
    for name, naive in naive_contributions(model, arguments.layers, images, arguments.steps).items():
        net = (result[name].positive + result[name].negative).cpu()
        errors.append(float((net - naive).norm() / naive.norm()))
    return max(errors)


def _interleaved(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def _print_table(seconds: dict[str, list[float]], batch: int) -> None:
    bare = statistics.median(seconds["bare"])
    print(f"{'':8}{'median s':>10}{'min':>8}{'max':>8}{'images/s':>10}{'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        numbers = f"{median:10.3f}{min(times):8.3f}{max(times):8.3f}{batch / median:10.2f}{median / bare:8.2f}"
        print(f"{name:8}{numbers}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="module:codec_dist.demo.classifier:digits_classifier", help="model spec")
    parser.add_argument("--layers", nargs="+", default=["blocks"], help="layer keys, globs or presets")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3), help="colour channels of the images")
    parser.add_argument("--batch", type=int, default=64, help="images per call")
    parser.add_argument("--steps", type=int, default=10, help="steps S of integrated gradients")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one to warm up")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="leave the naive reference out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
