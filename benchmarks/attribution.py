"""The attribution engine against the least that its arithmetic can cost, and against the obvious way.

Three contenders, interleaved so that a noisy machine cannot favour one:

- bare: S forward passes and input gradients of the frozen model (channels_last, BatchNorm unfolded, in evaluation
  mode, in the same precision), nothing captured and nothing reduced. This is the floor.
- engine: `codec_dist.attribution.Attributor`, integrated gradients of all chosen layers, with completeness.
- naive: S + 1 passes with weight gradients, every hidden tensor and gradient of every step moved to the host
  and kept, multiplied and reduced at the end (a stand-in for research code). Left out with --no-naive.

With --equal-residual the contenders are rules for the points of the path instead, on a published network and
photographs (see docs/real_network.md): images/s of each where contributions miss at most so much of what they explain.

Prints a table for people and one JSON line for machines. Ratios are medians over the rounds of a contender's time over
that of bare in the same round. Peak host memory is that of a process which runs one contender once, less what it
held before; peak device memory likewise.

    python -m benchmarks.attribution --model torchvision:resnet50 --size 224 --channels 3 --batch 16 --rounds 3
    python -m benchmarks.attribution --model timm:vit_base_patch16_224 --size 224 --channels 3 --batch 8 --no-naive
    python -m benchmarks.attribution --model torchvision:resnet50 --size 224 --channels 3 --batch 128 \
        --device cuda --autocast bfloat16
    python -m benchmarks.attribution --equal-residual 0.1 0.05 0.02 --stamps /usr/share/tuxpaint/stamps
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from codec_dist.attribution import Attributor, IntegratedGradients
from codec_dist.config import ModelSection
from codec_dist.models import load_model, resolve_layers

IMAGENET_TRAINING_IMAGES = 1_281_167


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.equal_residual:
        _print_equal_residual(arguments)
        return
    contenders, attributor, model, images = _contenders(arguments)
    if arguments.only:
        print(json.dumps(_peak_of(contenders[arguments.only], arguments.device)))
        return
    seconds = _interleaved(contenders, arguments.rounds, arguments.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(mine / bare for mine, bare in zip(times, seconds["bare"], strict=True))
        for name, times in seconds.items()
    }
    rates = {name: arguments.batch / median for name, median in medians.items()}
    result = {
        "benchmark": "attribution",
        "model": arguments.model,
        "layers": len(attributor.layers),
        "batch": arguments.batch,
        "size": arguments.size,
        "steps": arguments.steps,
        "device": _device_name(arguments.device),
        "precision": arguments.autocast or "float32",
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "images_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "ratio_to_bare": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "peak_bytes": {name: _measure_peak(name) for name in contenders} if arguments.memory else {},
        "imagenet_training_hours": round(IMAGENET_TRAINING_IMAGES / rates["engine"] / 3600, 2),
    }
    result["errors"] = _errors(model, attributor, arguments, images) if arguments.naive else {}
    _print_table(seconds, ratios, arguments.batch)
    _print_rest(result)
    print(json.dumps(result))


def _print_equal_residual(arguments: argparse.Namespace) -> None:
    # Here, not at the top: it needs the packages of benchmarks/requirements.txt.
    from benchmarks.equal_residual import measure

    limits = sorted(arguments.equal_residual, reverse=True)
    found = measure(limits, arguments.stamps, arguments.photographs, arguments.probe, arguments.microbatch)
    print(json.dumps({"benchmark": "attribution, equal residual", "threads": torch.get_num_threads(), **found}))


def bare_loop(model: nn.Module, images: Tensor, steps: int, autocast: torch.dtype | None = None) -> None:
    """S forward passes and gradients to the input of the largest output."""
    images = images.contiguous(memory_format=torch.channels_last)
    for step in range(1, steps + 1):
        point = (images * (step / steps)).requires_grad_()
        with nullcontext() if autocast is None else torch.autocast(images.device.type, autocast):
            output = model(point)
        torch.autograd.grad(output.amax(dim=1).sum(), point)


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
        h, g = torch.stack(hidden.pop(name)), torch.stack(gradients.pop(name))
        total = (0.5 * (g[1:] + g[:-1]) * (h[1:] - h[:-1])).sum(dim=0)
        contributions[name] = total.flatten(2).sum(dim=2) if total.ndim == 4 else total.sum(dim=1)
    return contributions


def _contenders(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Callable[[], object]], Attributor, nn.Module, Tensor]:
    torch.manual_seed(0)
    values = [0.5] * arguments.channels
    preprocessing = {"size": arguments.size, "channels": arguments.channels, "mean": values, "std": values}
    section = ModelSection.model_validate(
        {"spec": arguments.model, "weights": arguments.weights, "preprocessing": preprocessing}
    )
    model = load_model(section).module.to(arguments.device)
    floor = load_model(section).module.to(arguments.device, memory_format=torch.channels_last)
    shape = (arguments.batch, arguments.channels, arguments.size, arguments.size)
    images = torch.randn(shape, device=arguments.device)
    autocast = getattr(torch, arguments.autocast) if arguments.autocast else None
    attributor = Attributor(
        model, arguments.layers, IntegratedGradients(arguments.steps, points="uniform"), autocast=arguments.autocast
    )
    contenders: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_loop(floor, images, arguments.steps, autocast),
        "engine": lambda: attributor(images),
    }
    if arguments.naive:
        contenders["naive"] = lambda: naive_contributions(model, arguments.layers, images, arguments.steps)
    attributor.probe(images)
    return contenders, attributor, model, images


def _errors(
    model: nn.Module, attributor: Attributor, arguments: argparse.Namespace, images: Tensor
) -> dict[str, float]:
    """Relative norm per layer of engine minus naive net contributions: the median and the largest over layers."""
    result, errors = attributor(images), []
    for name, naive in naive_contributions(model, arguments.layers, images, arguments.steps).items():
        errors.append(float((result[name].net.cpu() - naive).norm() / naive.norm()))
    return {"median": statistics.median(errors), "largest": max(errors)}


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


def _measure_peak(name: str) -> dict[str, int]:
    """In a process of its own, for a peak never falls."""
    command = [sys.executable, "-m", "benchmarks.attribution", *sys.argv[1:], "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _peak_of(run: Callable[[], object], device: str) -> dict[str, int]:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    held = _resident()
    run()
    _wait(device)
    return {"host": max(0, _resident("VmHWM") - held), "device": torch.cuda.max_memory_allocated() if cuda else 0}


def _resident(line: str = "VmRSS") -> int:
    """Memory of this process in bytes, now or (VmHWM) at most; getrusage would count the parent's, too."""
    with open("/proc/self/status") as file:
        return next(int(each.split()[1]) * 1024 for each in file if each.startswith(f"{line}:"))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def _print_table(seconds: dict[str, list[float]], ratios: dict[str, float], batch: int) -> None:
    print(f"{'':8}{'median s':>10}{'min':>8}{'max':>8}{'images/s':>10}{'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        numbers = f"{median:10.3f}{min(times):8.3f}{max(times):8.3f}{batch / median:10.2f}{ratios[name]:8.2f}"
        print(f"{name:8}{numbers}")


def _print_rest(result: dict) -> None:
    for name, peak in result["peak_bytes"].items():
        print(
            f"{name:8}peak of host memory {peak['host'] / 1e9:.2f} GB, of device memory {peak['device'] / 1e9:.2f} GB"
        )
    for which, error in result["errors"].items():
        print(f"relative error of net contributions against naive, {which} over layers: {error:.2g}")
    print(
        f"ImageNet's 1.28 M training images would take the engine {result['imagenet_training_hours']:,.1f} hours here"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="module:codec_dist.demo.classifier:digits_classifier", help="model spec")
    parser.add_argument("--weights", default="none", help="none (random), default (pretrained) or a file")
    parser.add_argument("--layers", nargs="+", default=["blocks"], help="layer keys, globs or presets")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=1, choices=(1, 3), help="colour channels of the images")
    parser.add_argument("--batch", type=int, default=64, help="images per call")
    parser.add_argument("--steps", type=int, default=10, help="steps S of integrated gradients")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="precision of bare loop and engine")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default torch's choice")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one to warm up")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="leave the naive reference out")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument(
        "--equal-residual", type=float, nargs="+", help="compare rules for path points at these residuals"
    )
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="folder of the stamps")
    parser.add_argument("--photographs", type=int, default=20, help="photographs that are judged, at most 20")
    parser.add_argument("--probe", type=int, default=48, help="stamps on which points are learned")
    parser.add_argument("--microbatch", type=int, default=8, help="photographs that pass through the network at once")
    parser.add_argument("--only", choices=("bare", "engine", "naive"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
