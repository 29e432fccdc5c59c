"""What the remedies for dead modes do for `stsae` on the activations of a run's store (the demo's, say).

Trains `stsae` on some layers of the store as `codec-dist train` would, on one rank, with each remedy: the paper's
recipe (hidden width 2,048, τ = .9, λ = 5e-5, Adam at 5e-5, halved on a plateau, 300 epochs of batches of 128), the same
network with a narrower encoder and a higher rate, and that one with the remedies by option. Reports explained variance
on the *evaluate* part, and how many modes fire there. The run itself is not changed.

    python -m benchmarks.sae_remedies --config runs/digits/config.yaml
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codec_dist.config import Choice, Config, SaeGroup, TrackingSection, TrainingSettings, load_config
from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.parts import read_parts
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask, plan_jobs
from codec_dist.utils import read_json

NARROW = {"hidden_per_channel": 4, "threshold": 0.8}
RESAMPLED = {"resample_every": 8000, "dead_window": 2000}
PAPER = TrainingSettings(epochs=300, learning_rate=5e-5, schedule="plateau", patience=10)
FAST = TrainingSettings(epochs=80, learning_rate=1e-3)
RECIPES: dict[str, tuple[dict[str, Any], TrainingSettings]] = {
    "the paper's recipe": ({"hidden": 2048, "threshold": 0.9}, PAPER),
    "narrow and fast": (NARROW, FAST),
    "… initial_l0": (NARROW | {"initial_l0": 8}, FAST),
    "… initial_l0, AuxK": (NARROW | {"initial_l0": 8, "auxk": 16}, FAST),
    "… resampling": (NARROW | RESAMPLED, FAST),
    "… initial_l0, resampling": (NARROW | RESAMPLED | {"initial_l0": 8}, FAST),
}


@dataclass(frozen=True)
class Outcome:
    """One SAE on held-out rows."""

    layer: str
    recipe: str
    ev: float
    """Explained variance on the *evaluate* part."""
    alive: int
    """Modes that fire there."""
    modes: int


def compare(config: Config, layers: Sequence[str], recipes: Sequence[str], quantity: str) -> list[Outcome]:
    """Train with each recipe on each layer, and judge."""
    run = Path(config.run.directory)
    store = ContributionStore(run / "store")
    parts = read_parts(store, run / "split.parquet")
    found = []
    with tempfile.TemporaryDirectory(prefix="remedies-") as folder:
        for recipe in recipes:
            options, settings = RECIPES[recipe]
            group = SaeGroup(
                architecture=Choice(name="stsae", options=options),
                layers=tuple(layers),
                quantities=(quantity,),
                training=settings,
            )
            jobs = plan_jobs(store, [group], parts.split_hash, config.run.seed)
            task = TrainingTask(
                directory=Path(folder),
                store_path=run / "store",
                split_path=run / "split.parquet",
                jobs=tuple(jobs),
                name="remedies",
                seed=config.run.seed,
                evaluations=1,
                checkpoints=1,
                tracking=TrackingSection(mode="disabled"),
                threads=torch.get_num_threads(),
            )
            train_on_rank(task, Ranks())
            for job in jobs:
                metrics = read_json(task.folder(job) / "metrics.json")["evaluate"]
                modes = len(metrics["frequency"])
                found.append(Outcome(job.layer, recipe, metrics["ev"], int(metrics["modes_alive"]), modes))
    return found


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    started = time.monotonic()
    outcomes = compare(load_config(Path(arguments.config)), arguments.layers, arguments.recipes, arguments.quantity)
    _print_table(outcomes)
    result = {
        "benchmark": "sae_remedies",
        "quantity": arguments.quantity,
        "seconds": round(time.monotonic() - started, 1),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "outcomes": [vars(outcome) for outcome in outcomes],
    }
    print(json.dumps(result))


def _print_table(outcomes: Sequence[Outcome]) -> None:
    layers = list(dict.fromkeys(outcome.layer for outcome in outcomes))
    print(f"{'':26}" + "".join(f"{layer:>24}" for layer in layers))
    for recipe in dict.fromkeys(outcome.recipe for outcome in outcomes):
        cells = {outcome.layer: outcome for outcome in outcomes if outcome.recipe == recipe}
        words = [f"{cells[layer].ev:.3f}, {cells[layer].alive} of {cells[layer].modes}" for layer in layers]
        print(f"{recipe:26}" + "".join(f"{word:>24}" for word in words))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config of a run whose store is complete")
    parser.add_argument("--layers", nargs="+", default=["blocks.1", "blocks.3", "blocks.5"], help="layers or globs")
    parser.add_argument("--quantity", default="activation-positive", help="[%(default)s]")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
