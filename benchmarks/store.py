"""The store's reads and writes against raw files of the same bytes.

Every shard has eight arrays of one chunk each (two layers, both signs of contributions and activations; half of the
numbers zero, as each sign of a number is). Contenders, interleaved shard by shard or chunk by chunk so that a noisy
disk cannot favour one:

- raw: `open(path, "wb").write(array)` and `open(path, "rb").read()`, a file for each chunk. This is the floor.
- store: `BlockWriter.write` (checks of the values, checksums, table of samples, marker) and whole chunks in a
  shuffled order through `ContributionStore.blocks`, each compared with its checksum.
- ahead: the same chunks in the same order through `ContributionStore.chunks` (two threads read ahead); no raw
  reads in between.

Uncompressed chunks of every size first, then the encodings at one size. Files lie in the page cache when they are
read: a disk would hide what is measured. Prints a table for people and one JSON line for machines; MB/s are of the
numbers before compression, by the median time of a shard (write) or chunk (read); `ratio` is to raw's.
"""

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codec_dist.store import BlockWriter, ChunkName, ContributionStore, create_store

CHANNELS = 2048
LAYERS = ("layer3.5", "layer4.2")
QUANTITIES = ("contribution-positive", "contribution-negative", "activation-positive", "activation-negative")
MIB = 2**20


@dataclass
class Form:
    """What is measured: a size of chunks and an encoding, with the times of all rounds."""

    mib: float
    compression: str = "none"
    sharding: int | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Contender → seconds for each shard or chunk."""
    fraction: float = 1.0
    """Bytes in files over bytes of numbers."""

    @property
    def name(self) -> str:
        """For the table."""
        parts = [self.compression] if self.compression != "none" else []
        parts += [f"sharded by {self.sharding}"] if self.sharding else []
        return ", ".join(parts) or "plain"

    def rate(self, contender: str) -> float:
        """MB/s of a contender."""
        chunks = len(LAYERS) * len(QUANTITIES) if contender.endswith("write") else 1
        return chunks * self.mib * MIB / 1e6 / statistics.median(self.seconds[contender])

    def ratio(self, contender: str) -> float:
        """A contender's rate over raw's."""
        return self.rate(contender) / self.rate(f"raw {contender.split()[-1]}")

    @contextmanager
    def timed(self, contender: str, parts: int = 1) -> Iterator[None]:
        """Note how long a block takes, which does ``parts`` chunks."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(contender, []).append((time.perf_counter() - started) / parts)


def main() -> None:
    """Measure, print."""
    arguments = _arguments()
    rows = round(arguments.encoded * MIB / (4 * CHANNELS))
    forms = [Form(mib) for mib in arguments.sizes]
    forms += [Form(arguments.encoded, compression) for compression in ("lz4", "zstd")]
    forms += [Form(arguments.encoded, "none", rows // 8), Form(arguments.encoded, "lz4", rows // 8)]
    for number in range(arguments.rounds + 1):
        for form in forms:
            with _folder(arguments.folder) as folder:
                measure(form, folder, arguments.total * MIB)
            if not number:  # the first round warms up
                form.seconds.clear()
    _print_table(forms)
    print(json.dumps(_as_json(forms, arguments)))


def measure(form: Form, folder: Path, total_bytes: int) -> None:
    """One round: write the shards, then read all chunks in a random order."""
    rows = round(form.mib * MIB / (4 * CHANNELS))
    arrays = [(layer, quantity) for layer in LAYERS for quantity in QUANTITIES]
    shards = max(2, round(total_bytes / (len(arrays) * rows * CHANNELS * 4)))
    values, samples = _numbers(rows), _samples(rows)
    create_store(
        folder / "store",
        identity={"benchmark": "store"},
        layers=dict.fromkeys(LAYERS, CHANNELS),
        targets=["top_1"],
        quantities=QUANTITIES,
        shards=[(f"shard-{number:06d}.tar", rows) for number in range(shards)],
        compression=form.compression,
        sharding=form.sharding,
    )
    writer = BlockWriter(folder / "store")
    for number in range(shards):
        with form.timed("raw write"):
            for place, name in enumerate(arrays):
                with open(folder / f"raw-{number}-{place}", "wb") as file:
                    file.write(values[name].data)
        with form.timed("store write"):
            writer.write(number, values, samples)
    files = list((folder / "store" / "arrays.zarr").rglob("c.*.0"))
    form.fraction = sum(path.stat().st_size for path in files) / (shards * len(arrays) * rows * CHANNELS * 4)
    _read(form, folder)


def _read(form: Form, folder: Path) -> None:
    store = ContributionStore(folder / "store")
    arrays = [(layer, quantity) for layer in LAYERS for quantity in QUANTITIES]
    order = [(number, place) for number in store.shard_numbers for place in range(len(arrays))]
    np.random.default_rng(1).shuffle(order)
    for number, place in order:
        with form.timed("raw read"), open(folder / f"raw-{number}-{place}", "rb") as file:
            file.read()
        with form.timed("store read"):
            next(store.blocks(*arrays[place], shards=[number]))
    names: dict[tuple[int, int], list[ChunkName]] = {}
    for name in store.chunk_names():
        names.setdefault((name.shard_number, arrays.index((name.layer, name.quantity))), []).append(name)
    with form.timed("ahead read", parts=len(order)):
        for _ in store.chunks((name for number, place in order for name in names[number, place]), in_memory=4):
            pass


def _numbers(rows: int) -> dict[tuple[str, str], np.ndarray]:
    """Rectified noise: half zeros, the rest of either sign as the quantity asks."""
    random, values = np.random.default_rng(0), {}
    for layer in LAYERS:
        net = random.standard_normal((rows, CHANNELS), dtype=np.float32)
        for quantity in QUANTITIES:
            values[layer, quantity] = np.maximum(net, 0) if quantity.endswith("positive") else np.minimum(net, 0)
    return values


def _samples(rows: int) -> pa.Table:
    numbers = np.arange(rows)
    return pa.table(
        {
            "key": [f"n{number:08d}" for number in numbers],
            "label": numbers % 1000,
            "prediction": numbers % 999,
            "target_value": numbers / 7,
            "baseline_value": np.zeros(rows),
            **{f"completeness.{layer}": numbers / 9 for layer in LAYERS},
        }
    )


@contextmanager
def _folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="codec-store-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _print_table(forms: list[Form]) -> None:
    print(f"{'':28}{'write MB/s':>21}{'':8}{'shuffled read MB/s':>27}")
    print(
        f"{'chunk MiB':>10}  {'encoding':<16}{'raw':>10}{'store':>11}{'ratio':>8}"
        f"{'raw':>9}{'store':>9}{'ratio':>7}{'ahead':>9}{'ratio':>7}{'size':>7}"
    )
    for form in forms:
        print(
            f"{form.mib:10g}  {form.name:<16}"
            f"{form.rate('raw write'):10,.0f}{form.rate('store write'):11,.0f}{form.ratio('store write'):8.2f}"
            f"{form.rate('raw read'):9,.0f}{form.rate('store read'):9,.0f}{form.ratio('store read'):7.2f}"
            f"{form.rate('ahead read'):9,.0f}{form.ratio('ahead read'):7.2f}{form.fraction:7.2f}"
        )


def _as_json(forms: list[Form], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "store",
        "machine": platform.machine(),
        "rounds": arguments.rounds,
        "total_mib": arguments.total,
        "forms": [
            {
                "chunk_mib": form.mib,
                "encoding": form.name,
                "megabytes_per_second": {name: round(form.rate(name), 1) for name in form.seconds},
                "write_ratio": round(form.ratio("store write"), 3),
                "read_ratio": round(form.ratio("store read"), 3),
                "read_ahead_ratio": round(form.ratio("ahead read"), 3),
                "size": round(form.fraction, 3),
            }
            for form in forms
        ],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 4, 8, 16], help="MiB of uncompressed chunks")
    parser.add_argument("--encoded", type=float, default=8, help="MiB of the chunks that are encoded")
    parser.add_argument("--total", type=int, default=128, help="MiB that each contender writes and reads in a round")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one to warm up")
    parser.add_argument("--folder", help="where to write; by default the folder for temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
