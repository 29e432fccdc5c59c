"""Training of sparse autoencoders against the least that it can cost, and against the obvious way.

TopK SAEs on rows that are sparse mixtures. Contenders, interleaved so that a noisy machine cannot favour one; each
trains for one epoch after one to warm up:

- bare: the same SAE on one tensor in memory: a permutation, `index_select`, loss, backward, fused Adam, constraints.
  No logging, no evaluation. This is the floor.
- resident: `train_on_rank` (what every rank of `codec-dist train` runs), all rows in memory; by the rate that the
  training logs, which leaves evaluations out.
- streamed: the same with rows that do not fit: whole chunks in a random order, read ahead, mixed in a reservoir
  that holds an eighth of the rows (`--window`).
- research: `TensorDataset`, `DataLoader(shuffle=True)`, a plain TopK module (encode, topk, scatter, decode, unit rows),
  `torch.optim.Adam` as it comes, the loss fetched at every step. No AuxK, no counts of dead modes.
- stack: `--together` SAEs of different seeds in one batched computation, as the bare loop.

All of them keep freed memory in the process (`codec_dist.utils.keep_freed_memory`), as the trainer does.

Prints a table for people and one JSON line for machines. Ratios are medians over the rounds of bare's time over that
of a contender in the same round (`stack`: K times bare's), so 1 is as fast as bare and more is faster. Peak memory is
that of a process which runs one contender once, less what it held before. The mixing of the streamed order is told
for a batch and for a hundred batches (`codec_dist.training.rows.mixing_quality`; 1: as a full permutation).

    python -m benchmarks.sae --channels 256
    python -m benchmarks.sae --channels 2048 --rows 2048 --batch 128 --rounds 3
    python -m benchmarks.sae --channels 2048 --rows 262144 --batch 4096 --device cuda --together 16
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from codec_dist.config import Choice, SaeGroup, TrackingSection, TrainingSettings
from codec_dist.sae import StackedAutoencoder, TrainedAutoencoder, build
from codec_dist.store import BlockWriter, ContributionStore, create_store, finish_store
from codec_dist.training.collectives import Ranks
from codec_dist.training.parts import read_parts
from codec_dist.training.rank import train_on_rank
from codec_dist.training.rows import mixed_batches, mixing_quality
from codec_dist.training.sae_jobs import TrainingTask, plan_jobs
from codec_dist.utils import keep_freed_memory

LAYER, QUANTITY = "layer", "contribution-positive"
HELD_OUT = 64
RATE = 1e-3
NAMES = ("bare", "resident", "streamed", "research", "stack")


def main() -> None:
    """Measure, print."""
    keep_freed_memory()
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = make_rows(arguments.rows + 2 * HELD_OUT, arguments.channels)
        write_run(Path(folder), rows, arguments.rows_per_chunk)
        contenders = _contenders(arguments, rows[: arguments.rows], Path(folder))
        if arguments.only:
            print(json.dumps(_peak_of(contenders[arguments.only], arguments.device)))
            return
        seconds = _interleaved(contenders, arguments.rounds)
    times = {name: statistics.median(each) for name, each in seconds.items()}
    saes = {name: arguments.together if name == "stack" else 1 for name in seconds}
    ratios = {
        name: statistics.median(saes[name] * bare / own for own, bare in zip(each, seconds["bare"], strict=True))
        for name, each in seconds.items()
    }
    result = {
        "benchmark": "sae",
        "channels": arguments.channels,
        "modes": arguments.modes or 3 * arguments.channels,
        "k": arguments.k,
        "rows": arguments.rows,
        "batch": arguments.batch,
        "together": arguments.together,
        "device": _device_name(arguments.device),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "samples_per_second": {name: round(saes[name] * arguments.rows / each) for name, each in times.items()},
        "ratio_to_bare": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "ratio_to_research": _ratio(seconds, "resident", "research"),
        "mixing": _mixing(arguments),
        "peak_bytes": {name: _measure_peak(name) for name in contenders} if arguments.memory else {},
    }
    _print(seconds, result)
    print(json.dumps(result))


def make_rows(count: int, channels: int) -> Tensor:
    """Nonnegative rows [count, channels], each a mixture of about 4 of as many atoms as channels."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.rand(channels, channels, generator=generator) ** 4
    codes = torch.rand(count, channels, generator=generator)
    return torch.where(codes < 4 / channels, codes * channels / 4, 0) @ atoms + 0.01 * codes


def write_run(folder: Path, rows: Tensor, rows_per_chunk: int) -> None:
    """A store of one layer and its split: the last rows are held out."""
    sizes = [len(piece) for piece in rows.split(rows_per_chunk)]
    shards = [(f"shard-{number:06d}", size) for number, size in enumerate(sizes)]
    create_store(
        folder / "store",
        identity={"benchmark": "sae"},
        layers={LAYER: rows.shape[1]},
        targets=["top_1"],
        quantities=[QUANTITY],
        shards=shards,
    )
    writer, split = BlockWriter(folder / "store"), []
    for number, values in enumerate(rows.split(rows_per_chunk)):
        keys = [f"{row:06d}" for row in range(len(values))]
        zeros = np.zeros(len(values))
        columns = {"key": keys, "label": zeros.astype(np.int32), "prediction": zeros.astype(np.int32)}
        table = pa.table(columns | {"target_value": zeros, "baseline_value": zeros})
        writer.write(number, {(LAYER, QUANTITY): values.numpy()}, table)
        split += [(shards[number][0], key) for key in keys]
    finish_store(folder / "store")
    parts = ["fit"] * (len(rows) - 2 * HELD_OUT) + ["select"] * HELD_OUT + ["evaluate"] * HELD_OUT
    names, keys = zip(*split, strict=True)
    pq.write_table(pa.table({"shard": names, "key": keys, "part": parts}), folder / "split.parquet")


def bare_loop(saes: list[TrainedAutoencoder], rows: Tensor, batch: int) -> Callable[[], None]:
    """An epoch of the same steps; several SAEs as a stack."""
    model = saes[0] if len(saes) == 1 else StackedAutoencoder(saes)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def epoch() -> None:
        for numbers in torch.randperm(len(rows)).to(rows.device).split(batch):
            loss = model.loss(rows.index_select(0, numbers)).total.sum()
            optimizer.zero_grad()
            loss.backward()
            model.before_step()
            optimizer.step()
            model.after_step()

    return epoch


class PlainTopK(nn.Module):
    """TopK as one would write it down."""

    def __init__(self, channels: int, modes: int, k: int) -> None:
        super().__init__()
        self.k, self.bias = k, nn.Parameter(torch.zeros(channels))
        self.encoder, self.decoder = nn.Linear(channels, modes), nn.Linear(modes, channels, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        preactivations = self.encoder(rows - self.bias)
        values, modes = torch.topk(preactivations, self.k, dim=-1)
        loadings = torch.zeros_like(preactivations).scatter(-1, modes, torch.relu(values))
        return self.decoder(loadings) + self.bias

    @torch.no_grad()
    def normalize(self) -> None:
        """Unit norm for every mode."""
        self.decoder.weight.data = nn.functional.normalize(self.decoder.weight.data, dim=0)


def research_loop(rows: Tensor, modes: int, k: int, batch: int, device: str) -> Callable[[], None]:
    """An epoch of the obvious loop; rows stay on the host, as its data loader has them."""
    model = PlainTopK(rows.shape[1], modes, k).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    loader = DataLoader(TensorDataset(rows / rows.std()), batch_size=batch, shuffle=True)
    losses: list[float] = []

    def epoch() -> None:
        for (inputs,) in loader:
            inputs = inputs.to(device)
            loss = nn.functional.mse_loss(model(inputs), inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.normalize()
            losses.append(loss.item())

    return epoch


def train(folder: Path, arguments: argparse.Namespace, *, resident: bool) -> float:
    """Seconds of the second epoch of a training as ranks run it, by its own history; evaluations left out."""
    options = _options(arguments)
    settings = TrainingSettings(epochs=2, batch_size=arguments.batch, learning_rate=RATE, schedule="constant")
    group = SaeGroup(
        architecture=Choice(name="topk", options=options), layers=(LAYER,), quantities=(QUANTITY,), training=settings
    )
    store = ContributionStore(folder / "store")
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        jobs = plan_jobs(store, (group,), read_parts(store, folder / "split.parquet").split_hash, seed=0)
        task = TrainingTask(
            directory=Path(directory),
            store_path=folder / "store",
            split_path=folder / "split.parquet",
            jobs=tuple(jobs),
            name="benchmark",
            seed=0,
            evaluations=2,
            checkpoints=0,
            tracking=TrackingSection(mode="disabled"),
            threads=torch.get_num_threads(),
            bytes_for_rows=None if resident else 0,
            window_bytes=_window(arguments) * 4 * arguments.channels,
        )
        train_on_rank(task, Ranks(torch.device(arguments.device)))
        lines = (task.folder(jobs[0]) / "history.jsonl").read_text().splitlines()
    return arguments.rows / float(json.loads(lines[-1])["samples_per_second"])


def _contenders(arguments: argparse.Namespace, rows: Tensor, folder: Path) -> dict[str, Callable[[], float]]:
    here = rows.to(arguments.device)
    modes = arguments.modes or 3 * arguments.channels

    def saes(count: int) -> list[TrainedAutoencoder]:
        built = [build("topk", _options(arguments), arguments.channels, seed=seed) for seed in range(count)]
        for sae in built:
            sae.to(arguments.device).calibrate(here[:4096], rows.std().item())
        return [sae for sae in built if isinstance(sae, TrainedAutoencoder)]

    def second_of(make: Callable[[], Callable[[], None]]) -> float:
        """Time of the second epoch."""
        epoch = make()
        epoch()
        _wait(arguments.device)
        started = time.perf_counter()
        epoch()
        _wait(arguments.device)
        return time.perf_counter() - started

    contenders: dict[str, Callable[[], float]] = {
        "bare": lambda: second_of(lambda: bare_loop(saes(1), here, arguments.batch)),
        "resident": partial(train, folder, arguments, resident=True),
        "streamed": partial(train, folder, arguments, resident=False),
        "research": lambda: second_of(
            lambda: research_loop(rows, modes, arguments.k, arguments.batch, arguments.device)
        ),
        "stack": lambda: second_of(lambda: bare_loop(saes(arguments.together), here, arguments.batch)),
    }
    return {name: run for name, run in contenders.items() if name not in arguments.skip}


def _options(arguments: argparse.Namespace) -> dict[str, int]:
    return {"modes": arguments.modes or 3 * arguments.channels, "k": arguments.k}


def _window(arguments: argparse.Namespace) -> int:
    return arguments.window or max(arguments.batch, arguments.rows // 8)


def _interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(run())
    return seconds


def _mixing(arguments: argparse.Namespace) -> dict[str, float]:
    pieces = torch.arange(arguments.rows).split(arguments.rows_per_chunk)
    batches = mixed_batches(pieces, arguments.rows, _window(arguments), arguments.batch, 0, 0)
    chunks = (torch.cat(list(batches)) // arguments.rows_per_chunk).numpy()
    spans = {"batch": arguments.batch, "hundred_batches": 100 * arguments.batch}
    return {name: round(mixing_quality(chunks, span), 3) for name, span in spans.items() if span <= arguments.rows // 2}


def _ratio(seconds: dict[str, list[float]], name: str, other: str) -> float | None:
    if name not in seconds or other not in seconds:
        return None
    pairs = zip(seconds[other], seconds[name], strict=True)
    return round(statistics.median(slow / fast for slow, fast in pairs), 3)


def _measure_peak(name: str) -> dict[str, int]:
    """In a process of its own, for a peak never falls."""
    command = [sys.executable, "-m", "benchmarks.sae", *sys.argv[1:], "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _peak_of(run: Callable[[], float], device: str) -> dict[str, int]:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    held = _memory("VmRSS")
    run()
    return {"host": max(0, _memory("VmHWM") - held), "device": torch.cuda.max_memory_allocated() if cuda else 0}


def _memory(line: str) -> int:
    """Memory of this process in bytes: now (VmRSS) or at most (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(each.split()[1]) * 1024 for each in file if each.startswith(f"{line}:"))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else f"{platform.machine()} CPU"


def _print(seconds: dict[str, list[float]], result: dict) -> None:
    print(f"{'':10}{'median s':>10}{'min':>8}{'max':>8}{'samples/s':>11}{'ratio':>8}{'peak MB':>9}")
    for name, times in seconds.items():
        rate, ratio = result["samples_per_second"][name], result["ratio_to_bare"][name]
        peak = f"{result['peak_bytes'][name]['host'] / 1e6:9,.0f}" if name in result["peak_bytes"] else ""
        line = f"{statistics.median(times):10.3f}{min(times):8.3f}{max(times):8.3f}{rate:11,}{ratio:8.2f}{peak}"
        print(f"{name:10}{line}")
    if result["ratio_to_research"]:
        print(f"resident over research: {result['ratio_to_research']:.2f} times as many samples per second")
    for span, quality in result["mixing"].items():
        print(f"mixing of the streamed order over a {span.replace('_', ' ')}: {quality:.2f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256, help="numbers in a row")
    parser.add_argument("--modes", type=int, help="rows of the dictionary; default 3 per channel")
    parser.add_argument("--k", type=int, default=8, help="loadings per row")
    parser.add_argument("--rows", type=int, default=16384, help="rows of the fit part, which an epoch sees")
    parser.add_argument("--batch", type=int, default=128, help="rows per step")
    parser.add_argument("--window", type=int, help="rows of the reservoir; default an eighth of all")
    parser.add_argument("--rows-per-chunk", type=int, default=256, help="rows of a shard and chunk of the store")
    parser.add_argument("--together", type=int, default=4, help="SAEs of the stack")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default torch's choice")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, each with an epoch to warm up")
    parser.add_argument("--folder", help="where the store is made; default the system's place for temporary files")
    parser.add_argument("--skip", nargs="+", default=[], choices=NAMES[1:], help="contenders to leave out")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
