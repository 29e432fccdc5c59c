"""How complete integrated gradients are for a number of steps, and what methods, baselines and targets cost.

For each S, with uniform points and with points learned on the first half of the images: the median over the other half
of the relative completeness residual, of the worst and of the middle cut layer, and the time relative to S = 10. Then
each method, baseline and several targets, timed against integrated gradients with S = 10 of one target from zeros,
interleaved.

Images are a run's (`--config`, its evaluate part), or procedural shapes, on which a network with random weights is
first trained for some steps: untrained networks are so rough that no number of steps is complete.

    python -m benchmarks.completeness --config runs/digits/config.yaml --batch 64
    python -m benchmarks.completeness --model torchvision:resnet50 --size 64 --train-steps 150
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Iterable, Sequence
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
    UniformPoints,
    choose_from,
    dense_path,
    relative_residual,
)
from codec_dist.config import ModelSection, load_config
from codec_dist.models import LoadedModel, load_model
from codec_dist.shards import load_index, read_shard, shapes

CLASSES, TRAINING_BATCH = 10, 32


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    torch.manual_seed(0)
    loaded, images = _from_run(arguments) if arguments.config else _from_shapes(arguments)
    model, images = loaded.module.to(arguments.device), images.to(arguments.device)
    half = len(images) // 2
    engine = Attributor(model, arguments.layers, IntegratedGradients(10, points="uniform"))
    errors = engine.interval_errors(images[:half], dense_path(10))
    rows: list[dict[str, float | str]] = []
    for steps in arguments.steps:
        learned = choose_from(errors, IntegratedGradients(steps)).fractions if steps > 1 else (0.0, 1.0)
        for rule, points in (("uniform", UniformPoints().fractions(steps)), ("learned", learned)):
            rows.append({"points": rule, **_residuals(engine, images[half:], points)})
    reference = next(float(row["seconds"]) for row in rows if row["steps"] == 10)
    print(f"{'S':>4} {'points':8}{'worst layer':>13}{'middle layer':>14}{'time to S = 10':>16}")
    for row in rows:
        row["time"] = float(row.pop("seconds")) / reference
        print(f"{row['steps']:>4} {row['points']:8}{row['worst']:>13.2%}{row['middle']:>14.2%}{row['time']:>16.2f}")
    costs = _costs(model, arguments.layers, images, arguments.rounds) if arguments.rounds else {}
    print(f"{'':44}{'cost':>6}" if costs else "")
    for name, cost in costs.items():
        print(f"{name:44}{cost:>6.2f}")
    result = {"model": arguments.config or arguments.model, "batch": len(images), "residuals": rows, "costs": costs}
    print(json.dumps({"benchmark": "completeness", **result}))


def _residuals(engine: Attributor, images: Tensor, points: Sequence[float]) -> dict[str, float | str]:
    started = time.perf_counter()
    result = engine.with_method(IntegratedGradients(points=points))(images)
    medians = [
        float(relative_residual(layer.completeness, result.target_value, result.baseline_value).median())
        for layer in result.values()
        if layer.completeness is not None
    ]
    seconds = time.perf_counter() - started
    return {"steps": len(points) - 1, "worst": max(medians), "middle": statistics.median(medians), "seconds": seconds}


def _costs(model: nn.Module, layers: list[str], images: Tensor, rounds: int) -> dict[str, float]:
    settings: dict[str, tuple[Method, list[Target]]] = {
        "integrated gradients, S = 10": (IntegratedGradients(10, points="uniform"), [TopK()]),
        "… from a blurred image": (IntegratedGradients(10, Blur(images.shape[-1] / 16), points="uniform"), [TopK()]),
        "… of the frozen top class": (IntegratedGradients(10, points="uniform"), [TopK(frozen=True)]),
        "… of each of the top 5 classes at once": (
            IntegratedGradients(10, points="uniform"),
            [Rank(rank) for rank in range(1, 6)],
        ),
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
    options = {"num_classes": CLASSES} if arguments.weights == "none" else {}
    section = {"spec": arguments.model, "options": options, "weights": arguments.weights}
    loaded = load_model(ModelSection.model_validate({**section, "preprocessing": preprocessing}))
    trained_on = arguments.train_steps * TRAINING_BATCH
    source, _ = shapes(arguments.batch + trained_on, size=arguments.size, classes=CLASSES)

    def images(numbers: range) -> tuple[Tensor, Tensor]:
        made = list(source.read(numbers))
        pictures = [loaded.preprocessing(Image.open(io.BytesIO(each.image)).convert("RGB")) for each in made]
        return torch.stack(pictures), torch.tensor([each.label for each in made])

    places = range(arguments.batch, arguments.batch + trained_on, TRAINING_BATCH)
    _train(loaded.module, (images(range(first, first + TRAINING_BATCH)) for first in places), arguments.train_steps)
    probe, labels = images(range(arguments.batch))
    with torch.no_grad():
        right = (loaded.module(probe).argmax(1) == labels).float().mean()
    print(f"accuracy on {len(probe)} shapes that were not trained on: {right:.0%}")
    return loaded, probe


def _train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> None:
    if not steps:
        return
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for images, labels in batches:
        # Half of the contrast is random, so that a grey image has no class (as in the demo's classifier).
        contrast = torch.rand(len(images), 1, 1, 1)
        wanted = nn.functional.one_hot(labels, CLASSES) * contrast.flatten(1) + (1 - contrast.flatten(1)) / CLASSES
        loss = nn.functional.cross_entropy(model(images * contrast), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config of a run whose model and images are used")
    parser.add_argument("--model", default="torchvision:resnet50", help="model spec, without --config")
    parser.add_argument("--weights", default="none", help="none (random), default (pretrained) or a file")
    parser.add_argument("--size", type=int, default=224, help="height and width of the shapes")
    parser.add_argument("--train-steps", type=int, default=0, help="steps of 32 shapes to train for, without --config")
    parser.add_argument("--layers", nargs="+", default=["blocks"], help="layer keys, globs or presets")
    parser.add_argument("--batch", type=int, default=16, help="number of images")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50], help="numbers S; 10 among them")
    parser.add_argument(
        "--rounds", type=int, default=3, help="counted rounds of the costs, after one to warm up; 0: none"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
