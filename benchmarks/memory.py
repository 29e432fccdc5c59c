"""Peak memory of an extraction actor, as it was predicted and as it was.

For each model and microbatch a plan is made here, and a process of its own runs the actor (without Ray) on a few
shards, with two calls at a time as the coordinator makes them. What is compared is the largest resident set of that
process with the prediction by which `attribution.microbatch: auto` is chosen. A prediction should be above what is
measured, by no more than a half.

    python -m benchmarks.memory                                   # three models, about five minutes on two cores
    python -m benchmarks.memory --models resnet50 --microbatches 32
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from codec_dist.cluster_runtime import worker_environment
from codec_dist.config import parse_config
from codec_dist.extraction.plan import make_plan, open_store
from codec_dist.extraction.worker import Receipt, ShardTask, ShardWorker
from codec_dist.shards import pack, shapes
from codec_dist.utils import environment

MODELS = ("efficientnet_lite0", "resnet50", "vit_small_patch16_224")
SHARDS = 3


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm")
    parser.add_argument("--microbatches", nargs="+", type=int, default=(4, 16))
    parser.add_argument("--layers", nargs="+", default=["blocks"])
    parser.add_argument("--actor", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.actor:
        _run_actor(Path(arguments.actor))
        return
    found = []
    print(f"{'model':<24}{'microbatch':>12}{'layers':>8}{'predicted':>12}{'measured':>12}{'ratio':>8}   (MB)")
    for model in arguments.models:
        for microbatch in arguments.microbatches:
            one = _measure(model, arguments.layers, microbatch)
            found.append(one)
            print(
                f"{model:<24}{microbatch:>12}{one['layers']:>8}{one['predicted'] / 1e6:>12,.0f}"
                f"{one['measured'] / 1e6:>12,.0f}{one['predicted'] / one['measured']:>8.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "memory", "actors": found}))


def _measure(model: str, layers: list[str], microbatch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        count = SHARDS * 2 * microbatch
        pack(shapes(count, size=224)[0], Path(folder) / "shards", samples_per_shard=2 * microbatch)
        config = parse_config(
            {
                "run": {"directory": f"{folder}/run"},
                "data": {"shards": f"{folder}/shards"},
                "model": {"spec": f"timm:{model}", "weights": "none"},
                "attribution": {
                    "layers": layers,
                    "microbatch": microbatch,
                    "method": {"name": "integrated_gradients", "options": {"steps": 2, "points": "uniform"}},
                },
            }
        )
        plan, shards = make_plan(config)
        open_store(plan, shards, {"device": "cpu"})
        needs = plan.needs["cpu"].host
        task = Path(folder) / "task.pickle"
        task.write_bytes(pickle.dumps((plan, shards)))
        words = [sys.executable, "-m", "benchmarks.memory", "--actor", str(task)]
        with environment(worker_environment(1, 0)):
            ended = subprocess.run(words, check=True, capture_output=True, text=True)
        measured = int(ended.stdout.split()[-1])
        print(ended.stderr.splitlines()[-1], file=sys.stderr, flush=True)
        return {
            "model": model, "microbatch": microbatch, "layers": len(plan.layers), "measured": measured,
            "predicted": needs.bytes(microbatch), "fixed": needs.fixed, "per_image": needs.per_image,
        }  # fmt: skip


def _run_actor(task: Path) -> None:
    plan, shards = pickle.loads(task.read_bytes())  # noqa: S301  written by this program a moment ago
    worker = ShardWorker(plan, on_gpu=False, serial=0)
    assert worker.prepare() is None
    at_rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    receipts: list[Any] = []

    def extract(turns: range) -> None:
        for turn in turns:
            receipts.append(worker.extract(ShardTask(turn, shards[turn], 1, turn)))

    started = time.monotonic()
    threads = [threading.Thread(target=extract, args=(range(first, len(shards), 2),)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(receipt, Receipt) for receipt in receipts), receipts
    print(f"{time.monotonic() - started:.1f} s, at rest {at_rest / 1e6:.0f} MB", file=sys.stderr)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
