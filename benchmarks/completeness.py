"""How complete integrated gradients are for a number of steps, and what methods, baselines and targets cost.

For each S: the median over images of the relative completeness residual, of the worst and of the middle cut layer, and
the time relative to S = 10. Then each method, baseline and several targets, timed against integrated gradients with
S = 10 of one target from zeros, interleaved.

Images are a run's (`--config`, its evaluate part), or procedural shapes. Where a network has random weights, its
BatchNorm statistics are estimated from 64 other shapes, since as initialised they fit no image.

    python -m benchmarks.completeness --config runs/digits/config.yaml --batch 64
    python -m benchmarks.completeness --model torchvision:resnet50 --batch 8
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from codec_dist.attribution import (
    ActivationGradient,
    Attributor,
    Blur,
    IntegratedGradients,
    Method,
    Rank,
    SmoothGradient,
    Target,
    TopK,
    relative_residual,
)
from codec_dist.config import ModelSection, load_config
from codec_dist.models import LoadedModel, load_model
from codec_dist.shards import load_index, read_shard, shapes


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    torch.manual_seed(0)
    loaded, images = _from_run(arguments) if arguments.config else _from_shapes(arguments)
    model, images = loaded.module.to(arguments.device), images.to(arguments.device)
    rows = [_residuals(model, arguments.layers, images, steps) for steps in arguments.steps]
    reference = next(row["seconds"] for row in rows if row["steps"] == 10)
    print(f"{'S':>4}{'worst layer':>13}{'middle layer':>14}{'time to S = 10':>16}")
    for row in rows:
        row["time"] = row.pop("seconds") / reference
        print(f"{row['steps']:>4}{row['worst']:>13.2%}{row['middle']:>14.2%}{row['time']:>16.2f}")
    costs = _costs(model, arguments.layers, images, arguments.rounds)
    print(f"{'':44}{'cost':>6}")
    for name, cost in costs.items():
        print(f"{name:44}{cost:>6.2f}")
    result = {"model": arguments.config or arguments.model, "batch": len(images), "residuals": rows, "costs": costs}
    print(json.dumps({"benchmark": "completeness", **result}))


def _residuals(model: nn.Module, layers: list[str], images: Tensor, steps: int) -> dict[str, float]:
    attributor = Attributor(model, layers, IntegratedGradients(steps))
    attributor.probe(images)
    started = time.perf_counter()
    result = attributor(images)
    medians = [
        float(relative_residual(layer.completeness, result.target_value, result.baseline_value).median())
        for layer in result.values()
        if layer.completeness is not None
    ]
    seconds = time.perf_counter() - started
    return {"steps": steps, "worst": max(medians), "middle": statistics.median(medians), "seconds": seconds}


def _costs(model: nn.Module, layers: list[str], images: Tensor, rounds: int) -> dict[str, float]:
    settings: dict[str, tuple[Method, list[Target]]] = {
        "integrated gradients, S = 10": (IntegratedGradients(10), [TopK()]),
        "… from a blurred image": (IntegratedGradients(10, Blur(images.shape[-1] / 16)), [TopK()]),
        "… of the frozen top class": (IntegratedGradients(10), [TopK(frozen=True)]),
        "… of each of the top 5 classes at once": (IntegratedGradients(10), [Rank(rank) for rank in range(1, 6)]),
        "activation × gradient": (ActivationGradient(), [TopK()]),
        "SmoothGrad, 20 copies": (SmoothGradient(20), [TopK()]),
    }
    engines = {name: Attributor(model, layers, method, targets) for name, (method, targets) in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine(images)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    first, *_ = seconds.values()
    return {name: statistics.median(a / b for a, b in zip(times, first)) for name, times in seconds.items()}


def _from_run(arguments: argparse.Namespace) -> tuple[LoadedModel, Tensor]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    config = load_config(Path(arguments.config))
    loaded = load_model(config.model, seed=config.run.seed)
    split = pq.read_table(Path(config.run.directory) / "split.parquet")
    keys = set(split.filter(pc.equal(split["part"], "evaluate"))["key"].to_pylist())
    index = load_index(config.data.shards)
    images = [
        loaded.preprocessing(sample.image)
        for shard in index.shards
        for sample in read_shard(index.location, shard)
        if sample.key in keys and sample.image is not None
    ]
    return loaded, torch.stack(images[: arguments.batch])


def _from_shapes(arguments: argparse.Namespace) -> tuple[LoadedModel, Tensor]:
    values = [0.5] * 3
    preprocessing = {"size": arguments.size, "channels": 3, "mean": values, "std": values}
    loaded = load_model(
        ModelSection.model_validate(
            {"spec": arguments.model, "weights": arguments.weights, "preprocessing": preprocessing}
        )
    )
    source, _ = shapes(arguments.batch + 64, size=arguments.size)
    made = source.read(range(arguments.batch + 64))
    images = torch.stack([loaded.preprocessing(Image.open(io.BytesIO(each.image)).convert("RGB")) for each in made])
    if arguments.weights == "none":
        _estimate_norms(loaded.module, images[arguments.batch :])
    return loaded, images[: arguments.batch]


def _estimate_norms(model: nn.Module, images: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in images.split(16):
            model(batch)
    model.eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config of a run whose model and images are used")
    parser.add_argument("--model", default="torchvision:resnet50", help="model spec, without --config")
    parser.add_argument("--weights", default="none", help="none (random), default (pretrained) or a file")
    parser.add_argument("--size", type=int, default=224, help="height and width of the shapes")
    parser.add_argument("--layers", nargs="+", default=["blocks"], help="layer keys, globs or presets")
    parser.add_argument("--batch", type=int, default=16, help="number of images")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50], help="numbers S; 10 among them")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of the costs, after one to warm up")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
