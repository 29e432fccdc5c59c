"""Whether a change leaves every number as it was: a small demo run, and hashes of all that it computed.

Prints one JSON object: the digest of the store, and a hash for the weights of every SAE, for the values of every
Parquet file and Zarr array, and for the pixels of every figure. With `--against`, the output of an earlier run, it
names what differs and exits with 1. Two outputs are comparable where machine and libraries are the same.

    python -m benchmarks.guard > before.json
    python -m benchmarks.guard --against before.json
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr
from PIL import Image
from safetensors.numpy import load_file

from codec_dist.demo import run_demo
from codec_dist.store import ContributionStore

# Every stage of the demo, with as little as each can do: a few epochs, images and random draws.
SETTINGS = {
    "run.seed": 0,
    "data.limit": 700,
    "attribution.method.options.steps": 4,
    "cluster.actors": 1,
    "sae.groups.0.training.epochs": 6,
    "sae.groups.1.training.epochs": 4,
    "sae.evaluations": 1,
    "sae.checkpoints": 1,
    "interventions.percentages": "[10, 50]",
    "interventions.off_targets": 1,
    "interventions.random_draws": 2,
    "interventions.images_per_class": 2,
    "visualization.modes": 2,
    "visualization.images": 2,
    "tracking.mode": "disabled",
}

Hashes = dict[str, str]


def main() -> int:
    """Run, hash, print and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the run; default: a temporary one")
    parser.add_argument("--against", type=Path, help="output of an earlier run to compare with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary) / "run"
        run_demo(folder, [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))])
        found = hashes_of(folder)
    print(json.dumps(found, indent=1))
    if arguments.against is None:
        return 0
    differing = differences(json.loads(arguments.against.read_text(encoding="utf-8")), found)
    for line in differing:
        print(line, file=sys.stderr)
    print(f"{len(found)} hashes, {len(differing)} of them differ", file=sys.stderr)
    return 1 if differing else 0


def hashes_of(folder: Path) -> Hashes:
    """Hashes of all that a run computed, by what they are of."""
    found = {"store digest": ContributionStore(folder / "store").digest()}
    for path in sorted(_files(folder)):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = _hash_arrays(load_file(path))
        elif path.suffix == ".parquet":
            found[name] = _hash_table(path)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                found[name] = _hash_arrays({image.mode: np.asarray(image)})
        elif path.name == "zarr.json" and json.loads(path.read_text(encoding="utf-8"))["node_type"] == "array":
            found[path.parent.relative_to(folder).as_posix()] = _hash_arrays({"": zarr.open_array(path.parent)[...]})
    return found


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A line for each name that one side lacks, and for each whose hashes differ."""
    return [
        f"{name}: {before.get(name, 'missing')[:12]} before, {after.get(name, 'missing')[:12]} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _files(folder: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(folder):
        yield from (Path(directory) / name for name in names)


def _hash_table(path: Path) -> str:
    """Of names, types and values of the columns; not of the file's bytes, which name the library that wrote them."""
    table = pq.read_table(path).combine_chunks()
    hashed = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        hashed.update(f"{name} {column.type} {column.to_pylist()!r}".encode())
    return hashed.hexdigest()


def _hash_arrays(arrays: Mapping[str, object]) -> str:
    hashed = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        array = np.ascontiguousarray(value)
        hashed.update(f"{name} {array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
