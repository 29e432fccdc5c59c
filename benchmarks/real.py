"""A real ImageNet network at hand: EfficientNet-Lite with its published weights, and photographs for it.

`prepare` writes into a new folder OUT the weights under timm's names, the 20 photographs of ImageNet that foolbox
ships, photographs of objects (Debian's stamps for Tux Paint, each on a random background) that carry the network's own
confident answers as labels, shards of both, and a config. `run` gives that config to the project's command line.
`findings` compares finished runs or stores, block by block: completeness residual, sparsity, dimensionality, and
correlation of excitation and inhibition.

    pip install --no-deps -r benchmarks/requirements.txt          # beside the extra `vision`
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps
    python -m benchmarks.real prepare --out real --stamps stamps/usr/share/tuxpaint/stamps
    python -m benchmarks.real run --out real                      # all stages
    python -m benchmarks.real run --out real --command extract --run.directory "$PWD/real/short" --data.limit 300
    python -m benchmarks.real findings real/run real/short

Other benchmarks import `load_network`, `photographs` and `stamps`.
"""

import argparse
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as numbers_from
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.photographs import HOW_TO_GET_STAMPS, STAMPS, MissingError, Stamps, imagenet_photographs
from benchmarks.published import NETWORKS, load_from, load_network, write_weights
from benchmarks.real_findings import compare
from codec_dist.models import Preprocessing
from codec_dist.shards import read_class_list
from codec_dist.utils import CodecError

__all__ = ["load_network", "photographs", "stamps"]

LITE0 = Preprocessing(size=224, resize=256, interpolation="bicubic", channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
BATCH, SHARD = 32, 100
MOST_TRIED = 20
"""Pictures that are made at most for each one that is asked for."""
CONFIG = """\
# Written by `python -m benchmarks.real prepare`: {network} on {count:,} photographs of objects; fits two cores.
run:
  directory: run
  name: {network}
data:
  shards: shards/stamps
model:
  spec: timm:{network}
  weights: weights/{file}
attribution:
  layers: [blocks]
  method: {{name: integrated_gradients, options: {{steps: 10}}}}
sae:
  groups:
    - architecture: {{name: topk, options: {{modes: 64, k: 8}}}}
      training: {{epochs: 60, batch_size: 128, learning_rate: 2e-3}}
interventions:
  layers: ["blocks.1.*", "blocks.4.*", "blocks.6.*"]
  percentages: [2, 10, 50]
  targets: 8
  off_targets: 2
  random_draws: 5
  images_per_class: 4
visualization:
  layers: ["blocks.1.*", "blocks.4.*", "blocks.6.*"]
  modes: 3
  images: 4
"""


def photographs(preprocessing: Preprocessing = LITE0) -> tuple[Tensor, Tensor]:
    """The 20 photographs of ImageNet that foolbox ships, and their classes.

    Returns:
        Normalised images [20, channel, height, width] and labels [20], int64, from 0 to 999.
    """
    found = imagenet_photographs()
    return torch.stack([preprocessing(each.image) for each in found]), torch.tensor([each.label for each in found])


def stamps(folder: Path = STAMPS, count: int = 100, seed: int = 0, preprocessing: Preprocessing = LITE0) -> Tensor:
    """The first ``count`` photographs of objects on random backgrounds, without labels.

    Returns:
        Normalised images [count, channel, height, width]; those of a smaller ``count`` are the first of them.
    """
    made = _stamps(Path(folder), preprocessing, seed)
    return torch.stack([preprocessing(made.picture(number)) for number in range(count)])


@dataclass(frozen=True)
class Labelled:
    """A picture with the network's own answer."""

    name: str
    image: Image.Image
    label: int
    probability: float


def labelled_stamps(
    network: nn.Module, preprocessing: Preprocessing, made: Stamps, probability: float
) -> Iterator[Labelled | None]:
    """Pictures of stamps in turn, each with the network's answer; None for one of which it is less sure."""
    for first in numbers_from(0, BATCH):
        numbers = range(first, first + BATCH)
        pictures = [made.picture(number) for number in numbers]
        with torch.no_grad():
            sure, answers = network(torch.stack([preprocessing(each) for each in pictures])).softmax(1).max(1)
        for number, picture, value, answer in zip(numbers, pictures, sure.tolist(), answers.tolist()):
            yield Labelled(made.name(number), picture, answer, value) if value >= probability else None


def prepare(arguments: argparse.Namespace) -> int:
    """Write weights, both data sets, shards and config; print how good the network is on the photographs."""
    out, name = Path(arguments.out), arguments.network
    if (out.exists() and not out.is_dir()) or (out / "shards").exists():
        print(f"{out} is no folder, or was prepared before: give a new one", file=sys.stderr)
        return 2
    weights = write_weights(name, out / "weights" / f"{NETWORKS[name]}.safetensors")
    loaded = load_from(name, weights)
    print(f"weights of {NETWORKS[name]}: {weights}")
    _write_photographs(loaded.module, loaded.preprocessing, out / "photographs.parquet")
    made = _stamps(Path(arguments.stamps), loaded.preprocessing, arguments.seed)
    answers = labelled_stamps(loaded.module, loaded.preprocessing, made, arguments.probability)
    count = _write_stamps(answers, arguments.count, len(made.paths), out / "stamps.parquet")
    for data in ("photographs", "stamps"):
        options = ["--classes", "imagenet", "--samples-per-shard", str(SHARD)]
        _command("shards", "pack", str(out / f"{data}.parquet"), str(out / "shards" / data), *options)
    config = out / "config.yaml"
    config.write_text(CONFIG.format(network=NETWORKS[name], count=count, file=weights.name), encoding="utf-8")
    print(f"config: {config}; next: python -m benchmarks.real run --out {out}")
    return 0


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run a stage, or all of them, of the config in OUT by the project's command line."""
    _command(arguments.command, str(Path(arguments.out) / "config.yaml"), *overrides)
    return 0


def _write_photographs(network: nn.Module, preprocessing: Preprocessing, file: Path) -> None:
    images, labels = photographs(preprocessing)
    with torch.no_grad():
        answers = network(images).argmax(1)
    found, names = imagenet_photographs(), read_class_list("imagenet").names
    print(f"{int((answers == labels).sum())} of {len(labels)} photographs of ImageNet are recognised")
    for each, answer in zip(found, answers.tolist()):
        if each.label != answer:
            print(f"  {each.name}: {names[each.label]}, taken for {names[answer]}")
    _write(file, [each.name for each in found], [each.image for each in found], [each.label for each in found])


def _write_stamps(answers: Iterator[Labelled | None], count: int, available: int, file: Path) -> int:
    """Write the first ``count`` confident answers; returns how many there are."""
    kept: list[Labelled] = []
    tried = 0
    while len(kept) < count and tried < MOST_TRIED * count:
        tried += 1
        if (answer := next(answers)) is not None:
            kept.append(answer)
    if not kept:
        raise MissingError(f"the network is not sure enough of any of {tried:,} pictures: lower --probability")
    labels = Counter(each.label for each in kept)
    names = read_class_list("imagenet").names
    print(
        f"{len(kept):,} pictures of {len({each.name for each in kept})} of {available} stamps are labelled with "
        f"{len(labels)} classes; {tried - len(kept):,} of {tried:,} are left out, of which the network was not sure"
    )
    print("most frequent: " + ", ".join(f"{names[label]} ({number})" for label, number in labels.most_common(8)))
    _write(file, [each.name for each in kept], [each.image for each in kept], [each.label for each in kept])
    return len(kept)


def _write(file: Path, names: list[str], images: list[Image.Image], labels: list[int]) -> None:
    encoded = []
    for image in images:
        image.save(buffer := io.BytesIO(), format="png", compress_level=1)
        encoded.append(buffer.getvalue())
    columns = {"name": names, "image": pa.array(encoded, pa.binary()), "label": pa.array(labels, pa.int64())}
    pq.write_table(pa.table(columns), file, row_group_size=SHARD)


def _stamps(folder: Path, preprocessing: Preprocessing, seed: int) -> Stamps:
    # As large as images are before the central crop, so that they are not resized again.
    if not isinstance(preprocessing.resize, int) or not isinstance(preprocessing.size, int):
        raise ValueError(f"stamps are composed for square images: {preprocessing}")
    return Stamps(folder, preprocessing.resize, preprocessing.size, seed)


def _command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "codec_dist", *words], check=True)


def main() -> int:
    """Prepare, run or compare."""
    arguments, overrides = _parse()
    try:
        if arguments.action == "prepare":
            return prepare(arguments)
        if arguments.action == "run":
            return run(arguments, overrides)
        return compare(arguments.runs)
    except CodecError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return int(error.returncode)


def _positive(kind: type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        if (value := kind(text)) <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("prepare", help="write weights, data sets and config", epilog=HOW_TO_GET_STAMPS)
    making.add_argument("--out", required=True, help="new folder")
    making.add_argument("--network", choices=sorted(NETWORKS), default="lite0", help="[%(default)s]")
    making.add_argument("--stamps", default=str(STAMPS), help="folder of tuxpaint-stamps-default [%(default)s]")
    making.add_argument(
        "--count", type=_positive(int), default=1090, help="labelled photographs of objects [%(default)s]"
    )
    making.add_argument(
        "--probability",
        type=_positive(float),
        default=0.5,
        help="least of an answer that becomes a label [%(default)s]",
    )
    making.add_argument("--seed", type=int, default=0, help="of the pictures [%(default)s]")
    running = actions.add_parser(
        "run", help="run the pipeline on them", epilog="Further --section.key value words override the config."
    )
    running.add_argument("--out", required=True, help="the folder that `prepare` made")
    running.add_argument("--command", default="run", help="codec-dist's command: run (all stages), extract, … [run]")
    comparing = actions.add_parser("findings", help="sparsity, dimensionality and E/I by block, side by side")
    comparing.add_argument("runs", nargs="+", help="run folders, or stores, that are finished")
    arguments, overrides = parser.parse_known_args()
    if overrides and arguments.action != "run":
        parser.error(f"unknown words: {' '.join(overrides)}")
    return arguments, overrides


if __name__ == "__main__":
    sys.exit(main())
