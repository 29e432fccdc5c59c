"""How complete contributions are on a real ImageNet network, by the rule for the points of the path.

Points are learned on photographs of objects (stamps, see docs/real_network.md) and judged on the 20 photographs of
ImageNet, at all 16 blocks of EfficientNet-Lite0: the median over images of the relative residual, at the worst block
and in the mean over blocks; and how far contributions per channel are from those of a path of 200 points. Steps cost
alike, so the ratio of two rules' steps at equal residual is that of their images per second.

    pip install --no-deps -r benchmarks/requirements.txt
    python -m benchmarks.path_points --stamps /usr/share/tuxpaint/stamps
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.real import load_network, photographs, stamps
from codec_dist.attribution import (
    AttributionResult,
    Attributor,
    IntegratedGradients,
    PathPoints,
    PowerPoints,
    UniformPoints,
    choose_from,
    dense_path,
    relative_residual,
)

RULES: dict[str, PathPoints] = {"uniform": UniformPoints(), "square": PowerPoints(2.0), "cubic": PowerPoints(3.0)}
DENSE = PowerPoints(3.0).fractions(200)
BLURS = (4.0, 8.0, 16.0)


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    torch.manual_seed(0)
    network, _ = load_network("lite0")
    judged, _ = photographs()
    judged = judged[: arguments.images]
    probe = stamps(arguments.stamps, count=arguments.probe, seed=0)
    engine = Attributor(network, ["blocks"], IntegratedGradients(10, points="uniform"), microbatch=arguments.microbatch)
    engine.probe(judged)
    started = time.perf_counter()
    errors = engine.interval_errors(probe, dense_path(10))
    print(f"dense path of {len(probe)} pictures: {time.perf_counter() - started:.0f} s")
    reference = engine.with_method(IntegratedGradients(points=DENSE))(judged)
    rows = [_row("200 cubic", engine, judged, list(DENSE), reference)]
    for steps in arguments.steps:
        rules = {name: list(rule.fractions(steps)) for name, rule in RULES.items()}
        rules["learned"] = list(choose_from(errors, IntegratedGradients(steps)).fractions)
        rows += [_row(f"{name}, S = {steps}", engine, judged, points, reference) for name, points in rules.items()]
    for first in (6, 10):
        points = choose_from(errors, IntegratedGradients(first)).fractions
        for tolerance, most in ((0.15, 24), (0.1, 24), (0.05, 40)):
            method = IntegratedGradients(points=points, adaptive={"tolerance": tolerance, "most": most})
            name = f"learned, S = {first}, adaptive {tolerance:g} (most {most})"
            rows.append(_measured(name, engine.with_method(method)(judged), reference))
    if arguments.baselines:
        rows += _other_baselines(engine, judged, probe)
    print(json.dumps({"benchmark": "path_points", "images": len(judged), "probe": len(probe), "rows": rows}))


def _row(
    name: str, engine: Attributor, images: Tensor, points: list[float], reference: AttributionResult
) -> dict[str, object]:
    return _measured(name, engine.with_method(IntegratedGradients(points=points))(images), reference, len(points) - 1)


def _other_baselines(engine: Attributor, judged: Tensor, probe: Tensor) -> list[dict[str, object]]:
    """Ten steps from blurred images, with points learned for them; and from pictures, averaged (expected gradients)."""
    rows: list[dict[str, object]] = []
    for sigma in BLURS:
        baseline = {"name": "blur", "options": {"sigma": sigma}}
        blurred = engine.with_method(IntegratedGradients(10, baseline))
        errors = blurred.interval_errors(probe, dense_path(10))
        reference = engine.with_method(IntegratedGradients(baseline=baseline, points=DENSE))(judged)
        learned = choose_from(errors, IntegratedGradients(10)).fractions
        for rule, points in (("uniform", UniformPoints().fractions(10)), ("learned", learned)):
            result = engine.with_method(IntegratedGradients(baseline=baseline, points=points))(judged)
            rows.append(_measured(f"{rule}, S = 10, blurred by {sigma:g} pixels", result, reference, 10))
    for pictures in (1, 2, 5):
        steps = 10 // pictures
        rule: list[float] = list(UniformPoints().fractions(steps))
        name = f"uniform, S = {steps}, from each of {pictures} pictures"
        rows.append(
            _measured(
                name,
                _averaged(engine, judged, probe[:pictures], rule),
                _averaged(engine, judged, probe[:pictures], UniformPoints().fractions(100)),
                10,
            )
        )
    return rows


def _averaged(engine: Attributor, images: Tensor, starts: Tensor, points: Sequence[float]) -> AttributionResult:
    """Contributions and completeness averaged over starting images."""
    results = [engine.with_method(IntegratedGradients(baseline=start, points=points))(images) for start in starts]
    first = results[0]
    mean = {
        name: dataclasses.replace(
            layer,
            **{
                field: torch.stack([getattr(each[name], field) for each in results]).mean(0)
                for field in ("positive", "negative", "completeness")
            },
        )
        for name, layer in first.items()
    }
    value = torch.stack([each.baseline_value for each in results]).mean(0)
    return dataclasses.replace(first, layers=mean, baseline_value=value)


def _measured(
    name: str, result: AttributionResult, reference: AttributionResult, steps: int | None = None
) -> dict[str, object]:
    """One line: residuals, and the relative error per channel against the reference."""
    values = (result.target_value, result.baseline_value)
    medians = [float(relative_residual(layer.completeness, *values).quantile(0.5)) for layer in result.values()]
    channels = []
    for layer in result:
        found, expected = (
            torch.cat([each[layer].positive, each[layer].negative], dim=1) for each in (result, reference)
        )
        channels.append(float(((found - expected).norm(dim=1) / expected.norm(dim=1)).quantile(0.5)))
    mean_steps = float(result.steps.float().mean()) if result.steps is not None else float(steps or 0)
    row = {
        "rule": name,
        "steps": mean_steps,
        "worst": max(medians),
        "mean": statistics.mean(medians),
        "channel_error": statistics.mean(channels),
    }
    print(
        f"{name:45} {mean_steps:5.1f} steps: residual worst {row['worst']:.3f}, mean {row['mean']:.3f}; "
        f"per channel {row['channel_error']:.3f}",
        flush=True,
    )
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"), help="folder of the stamps")
    parser.add_argument("--probe", type=int, default=48, help="pictures on which points are learned")
    parser.add_argument("--images", type=int, default=20, help="photographs on which they are judged, at most 20")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10, 16, 24, 32, 48], help="numbers of steps")
    parser.add_argument("--baselines", action="store_true", help="blurred and averaged baselines, too")
    parser.add_argument("--microbatch", type=int, default=8, help="images that pass through the network at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
