"""Images per second at equal completeness: what a rule for the points of the path is worth in time.

For each rule (uniform, learned, adaptive) the number of steps, or the tolerance, is raised along a ladder until the
median over images of the relative residual is within each limit at every block; the rate is that of the same call.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.real import load_network, photographs, stamps
from codec_dist.attribution import (
    AttributionResult,
    Attributor,
    IntegratedGradients,
    IntervalErrors,
    choose_from,
    dense_path,
    relative_residual,
)

STEPS = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384)
TOLERANCES = (0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.05, 0.035, 0.025, 0.02, 0.015, 0.01, 0.007, 0.005)
ADAPTIVE_START, ADAPTIVE_MOST = 6, 400
MOST_LEARNED = 64
"""Steps for which the dense path has points enough."""


@dataclass(frozen=True)
class Rung:
    """One call: its mean steps per image, the residual of the worst block, and its rate."""

    setting: str
    steps: float
    residual: float
    images_per_second: float


def measure(limits: Sequence[float], folder: Path, images: int, probe: int, microbatch: int) -> dict[str, Any]:
    """Climb the ladders on ImageNet's photographs, with points learned on other pictures.

    Args:
        limits: relative residuals to reach, as .1 or .02.
        folder: Debian's stamps, on which points are learned.
        images: photographs that are judged, at most 20.
        probe: pictures on which points are learned.
        microbatch: images that pass through the network at once.

    Returns:
        The first rung within each limit by rule and limit (None: not within the ladder), for a JSON line.
    """
    network, _ = load_network("lite0")
    judged = photographs()[0][:images]
    engine = Attributor(network, ["blocks"], IntegratedGradients(10, points="uniform"), microbatch=microbatch)
    engine.probe(judged)
    errors = engine.interval_errors(stamps(folder, count=probe, seed=0), dense_path(10))
    found = {}
    for rule, methods in _ladders(errors).items():
        rungs = _climb(engine, judged, methods, min(limits))
        found[rule] = {f"{limit:g}": _first_within(rungs, limit) for limit in limits}
    _print_table(found, limits)
    return {"images": len(judged), "probe": probe, "rules": found}


def _ladders(errors: IntervalErrors) -> dict[str, Iterator[tuple[str, IntegratedGradients]]]:
    def learned(steps: int) -> IntegratedGradients:
        return IntegratedGradients(points=choose_from(errors, IntegratedGradients(steps)).fractions)

    def adaptive(tolerance: float) -> IntegratedGradients:
        settings = {"tolerance": tolerance, "most": ADAPTIVE_MOST}
        return IntegratedGradients(points=first.points, adaptive=settings)

    first = learned(ADAPTIVE_START)
    return {
        "uniform": ((f"S = {steps}", IntegratedGradients(steps, points="uniform")) for steps in STEPS),
        "learned": ((f"S = {steps}", learned(steps)) for steps in STEPS if steps <= MOST_LEARNED),
        "adaptive": ((f"tolerance {tolerance:g}", adaptive(tolerance)) for tolerance in TOLERANCES),
    }


def _climb(
    engine: Attributor, images: Tensor, methods: Iterable[tuple[str, IntegratedGradients]], least: float
) -> list[Rung]:
    rungs: list[Rung] = []
    for setting, method in methods:
        attributor = engine.with_method(method)
        started = time.perf_counter()
        result = attributor(images)
        seconds = time.perf_counter() - started
        steps = float(result.steps.float().mean()) if result.steps is not None else float(method.most_steps)
        rungs.append(Rung(setting, steps, _worst_residual(result), len(images) / seconds))
        print(f"  {rungs[-1]}", flush=True)
        if rungs[-1].residual <= least:
            break
    return rungs


def _worst_residual(result: AttributionResult) -> float:
    values = (result.target_value, result.baseline_value)
    return max(statistics.median(relative_residual(each.completeness, *values).tolist()) for each in result.values())


def _first_within(rungs: Sequence[Rung], limit: float) -> dict[str, Any] | None:
    return next((asdict(rung) for rung in rungs if rung.residual <= limit), None)


def _print_table(found: dict[str, dict[str, dict[str, Any] | None]], limits: Sequence[float]) -> None:
    print(f"{'residual of the worst block':30}" + "".join(f"{f'≤ {limit:.0%}':>28}" for limit in limits))
    for rule, rungs in found.items():
        print(f"{rule:30}" + "".join(f"{_cell(rungs[f'{limit:g}']):>28}" for limit in limits))


def _cell(rung: dict[str, Any] | None) -> str:
    return "not reached" if rung is None else f"{rung['steps']:.1f} steps, {rung['images_per_second']:.2f} images/s"
