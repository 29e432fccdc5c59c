"""Extraction end to end (tar, decoding, attribution, store, under Ray) against what it is made of.

Extraction and its floor in turn, round by round, so that a noisy machine cannot favour one; both with the same number
of processes and of threads in each:

- bare: the attribution engine in plain processes, each on its share of the same images, decoded and prepared before
  the clock starts. This is the floor of the cases `demo` and `resnet18`.
- reading: the same tars read, decoded and prepared in plain processes, and nothing else. The floor of `minimal` (JPEGs
  of 224²) and `minimal64` (uncompressed PNGs of 64², a tenth of a millisecond each), whose net is so small that
  reading dominates.
- extraction: `extract` as the command line calls it, in a Ray that serves all rounds. Its rate is the sum over actors
  of images per second between the actor's first shard and its last, so the start of the actors (which the last column
  includes) is left out: it is seconds, whatever the size of the data set.

Prints a table for people, with the actors' time split, and one JSON line for machines. Each case takes one to three
minutes on two cores that have nothing else to do.

    python -m benchmarks.extraction                    # all cases
    python -m benchmarks.extraction --cases minimal --count 4000 --rounds 1
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from codec_dist.cluster_runtime import ray_session
from codec_dist.config import Config, parse_config
from codec_dist.extraction import ExtractionSummary, extract
from codec_dist.extraction.batches import make_batches
from codec_dist.extraction.plan import build_attributor
from codec_dist.models import load_model
from codec_dist.shards import load_index, pack, read_shard, shapes
from codec_dist.tracking import Tracker, read_metrics

SECONDS_TO_END = 5.0
INTEGRATED = {"method": {"name": "integrated_gradients", "options": {"steps": 10, "points": "uniform"}}}
GRADIENT = {"method": {"name": "activation_gradient"}}
CASES: dict[str, dict[str, Any]] = {
    "demo": {
        "model": {"spec": "module:codec_dist.demo.classifier:digits_classifier"},
        "size": 16, "channels": 1, "attribution": INTEGRATED | {"layers": ["blocks"], "microbatch": 64},
        "count": 4000, "floor": "bare",
    },
    "resnet18": {
        "model": {"spec": "torchvision:resnet18"},
        "size": 64, "channels": 3, "attribution": INTEGRATED | {"layers": ["blocks"], "microbatch": 32},
        "count": 320, "floor": "bare",
    },
    "minimal": {
        "model": {"spec": "module:benchmarks.nets:minimal", "options": {"stride": 16}}, "image_format": "jpg",
        "size": 224, "channels": 3, "attribution": GRADIENT | {"layers": ["second"], "microbatch": 32},
        "count": 10_000, "floor": "reading",
    },
    "minimal64": {
        "model": {"spec": "module:benchmarks.nets:minimal", "options": {"stride": 4}},
        "size": 64, "channels": 3, "attribution": GRADIENT | {"layers": ["second"], "microbatch": 256},
        "count": 10_000, "floor": "reading",
    },
}  # fmt: skip


@dataclass
class Case:
    """What was measured of a case."""

    name: str
    floor: list[float] = field(default_factory=list)
    """Images per second in each round."""
    extraction: list[float] = field(default_factory=list)
    """Images per second in each round."""
    summaries: list[ExtractionSummary] = field(default_factory=list)

    def ratio(self) -> float:
        """Median over rounds of extraction's rate over its floor's."""
        return statistics.median(rate / base for rate, base in zip(self.extraction, self.floor, strict=True))


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    cases = []
    for name in arguments.cases:
        case = Case(name)
        with tempfile.TemporaryDirectory(prefix="extraction-") as folder:
            _measure(case, Path(folder), arguments)
        cases.append(case)
    _print_table(cases)
    print(json.dumps(_as_json(cases, arguments)))


def _measure(case: Case, folder: Path, arguments: argparse.Namespace) -> None:
    settings = CASES[case.name]
    count = arguments.count or settings["count"]
    # Several shards for each process, all of one size.
    per_shard = max(1, count // (arguments.actors * arguments.shards_per_actor))
    samples, classes = shapes(count, size=settings["size"], image_format=settings.get("image_format", "png"))
    pack(samples, folder / "shards", samples_per_shard=per_shard, classes=classes)
    configs = [_config(settings, folder, number, arguments) for number in range(arguments.rounds)]
    with ray_session(configs[0].cluster):
        for config in configs:
            # The actors of the round before end in their own time, at low priority.
            time.sleep(SECONDS_TO_END)
            seconds = _in_processes(FLOORS[settings["floor"]], config, arguments.actors)
            case.floor.append(count / seconds)
            with Tracker(Path(config.run.directory), config.tracking, stage="extract", group="", config={}) as tracker:
                case.summaries.append(extract(config, tracker))
            case.extraction.append(_rate_of_actors(config))


def _config(settings: dict[str, Any], folder: Path, number: int, arguments: argparse.Namespace) -> Config:
    values = [0.5] * settings["channels"]
    preprocessing = {"size": settings["size"], "channels": settings["channels"], "mean": values, "std": values}
    return parse_config(
        {
            "run": {"directory": str(folder / f"run-{number}")},
            "data": {"shards": str(folder / "shards"), "decode_threads": arguments.decode_threads},
            "model": settings["model"] | {"weights": "none", "preprocessing": preprocessing},
            "attribution": settings["attribution"],
            "cluster": {"actors": arguments.actors, "cpus_per_actor": arguments.threads},
            "tracking": {"mode": "disabled"},
        }
    )


def _rate_of_actors(config: Config) -> float:
    entries = read_metrics(Path(config.run.directory) / "metrics.jsonl")
    (table,) = [entry["table"] for entry in entries if "table" in entry]
    column = table["columns"].index("images per second")
    return sum(row[column] for row in table["rows"])


def bare(config: Config, rank: int, ranks: int, ready: Barrier) -> float:
    """Seconds in which a process attributes its share, which it has decoded before."""
    loaded = load_model(config.model, seed=config.run.seed)
    attributor = build_attributor(config, loaded)
    batches = [batch for shard in _batches(config, rank, ranks, loaded.preprocessing) for batch in shard]
    attributor(batches[0].images, batches[0].labels)
    ready.wait()
    started = time.monotonic()
    for batch in batches:
        attributor(batch.images, batch.labels)
    return time.monotonic() - started


def reading(config: Config, rank: int, ranks: int, ready: Barrier) -> float:
    """Seconds in which a process reads, decodes and prepares its share."""
    preprocessing = load_model(config.model, seed=config.run.seed).preprocessing
    # The first image makes Pillow load its decoders.
    next(_batches(config, rank, ranks, preprocessing)[0])
    shards = _batches(config, rank, ranks, preprocessing)
    ready.wait()
    started = time.monotonic()
    for shard in shards:
        for _ in shard:
            pass
    return time.monotonic() - started


FLOORS: dict[str, Callable[..., float]] = {"bare": bare, "reading": reading}


def _batches(config: Config, rank: int, ranks: int, prepare: Callable[..., Any]) -> list[Any]:
    index, size, data = load_index(config.data.shards), config.attribution.microbatch, config.data
    return [
        make_batches(read_shard(index.location, shard, threads=data.decode_threads), prepare, size, _never)
        for shard in index.shards[rank::ranks]
    ]


def _never(dropped: object) -> None:
    raise AssertionError(f"a sample cannot be used: {dropped}")


def _in_processes(work: Callable[..., float], config: Config, ranks: int) -> float:
    """Seconds until the last of some processes, which start together, is done with its share."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(ranks), context.Queue()
    threads = config.cluster.cpus_per_actor
    processes = [
        context.Process(target=_process, args=(work, config, rank, ranks, ready, results, threads))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    running: dict[Any, Any] = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode:
                # The others would wait for it.
                for process in processes:
                    process.terminate()
                raise RuntimeError(f"a process of {work.__name__!r} ended with code {ended.exitcode}")
    return max(results.get() for _ in processes)


def _process(
    work: Callable[..., float], config: Config, rank: int, ranks: int, ready: Barrier, results: Any, threads: int
) -> None:
    torch.set_num_threads(threads)
    results.put(work(config, rank, ranks, ready))


def _print_table(cases: list[Case]) -> None:
    columns = ("case", "floor", "its rate", "extraction", "ratio", "compute", "decode wait", "write", "idle")
    print(" ".join(f"{column:>11}" for column in (*columns, "with start")))
    for case in cases:
        rates = [statistics.median(rates) for rates in (case.floor, case.extraction)]
        split = [_median(case, f"{kind}_fraction") for kind in ("compute", "decode_wait", "write", "idle")]
        words = [
            case.name, CASES[case.name]["floor"], *(f"{rate:,.1f}" for rate in rates), f"{case.ratio():.3f}",
            *(f"{part:.1%}" for part in split), f"{_median(case, 'images_per_second'):,.1f}",
        ]  # fmt: skip
        print(" ".join(f"{word:>11}" for word in words))


def _median(case: Case, name: str) -> float:
    return statistics.median(getattr(summary, name) for summary in case.summaries)


def _as_json(cases: list[Case], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "extraction",
        "actors": arguments.actors,
        "threads_per_actor": arguments.threads,
        "decode_threads": arguments.decode_threads,
        "rounds": arguments.rounds,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cases": {
            case.name: {
                "count": arguments.count or CASES[case.name]["count"],
                "floor": CASES[case.name]["floor"],
                "images_per_second": {
                    "floor": [round(rate, 1) for rate in case.floor],
                    "extraction": [round(rate, 1) for rate in case.extraction],
                },
                "ratio": round(case.ratio(), 3),
                "time_split": {
                    kind: round(_median(case, f"{kind}_fraction"), 4)
                    for kind in ("compute", "decode_wait", "write", "idle")
                },
            }
            for case in cases
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--count", type=int, help="images [as many as take each case about half a minute]")
    parser.add_argument("--actors", type=int, default=2, help="processes of every contender [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="threads of each [%(default)s]")
    parser.add_argument("--decode-threads", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--shards-per-actor", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
