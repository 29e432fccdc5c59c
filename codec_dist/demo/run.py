"""The demo from nothing to a report: shards, classifier, then every stage of the packaged config."""

import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch
import yaml
from safetensors.torch import save

from codec_dist.config import Config, ConfigError, load_config
from codec_dist.demo.classifier import DigitsClassifier
from codec_dist.demo.training import BATCH_SIZE, EPOCHS, accuracy, train_classifier
from codec_dist.pipeline import STAGES, RunDirectory, part_images, run_stages
from codec_dist.report import findings
from codec_dist.shards import ShardIndex, digits, pack
from codec_dist.utils import Progress, hash_file, hash_json, read_json, write_bytes_atomically, write_json_atomically

SAMPLES_PER_SHARD = 150


def run_demo(directory: Path, overrides: Sequence[str] = ()) -> str:
    """Run the demo below ``directory``; what is done already is kept.

    Args:
        directory: the run's folder; made if it is missing.
        overrides: ``--section.key value`` words that change the packaged config.

    Returns:
        A short table of findings with the report's path, for the terminal.
    """
    config = demo_config(directory, overrides)
    _check_own(config, directory)
    samples, classes = digits()
    index = pack(samples, Path(config.data.shards), name="digits", samples_per_shard=SAMPLES_PER_SHARD, classes=classes)
    run_stages(config, ["prepare"])
    prepare_classifier(config, index)
    started = time.monotonic()
    run_stages(config, [stage.name for stage in STAGES if stage.name != "prepare"])
    run = RunDirectory(config.run.directory)
    return f"{findings(run.path)}\n\nreport: {run.report} ({time.monotonic() - started:.0f} s for all stages)"


def demo_config(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """The packaged config with ``directory`` as the run's folder."""
    directory = directory.resolve()
    places = ["--run.directory", ".", "--data.shards", "shards", "--model.weights", "model/classifier.safetensors"]
    placed = [word if word.startswith("--") else yaml.safe_dump(str(directory / word)).strip() for word in places]
    with as_file(files("codec_dist.demo") / "digits.yaml") as packaged:
        return load_config(packaged, [*placed, *overrides])


def _check_own(config: Config, directory: Path) -> None:
    """Refuse overrides of what the demo makes itself."""
    packaged = demo_config(directory)
    own = {
        "run.directory": (config.run.directory, packaged.run.directory),
        "data.shards": (config.data.shards, packaged.data.shards),
        "model.spec": (config.model.spec, packaged.model.spec),
        "model.weights": (config.model.weights, packaged.model.weights),
    }
    for key, (requested, made) in own.items():
        if requested != made:
            raise ConfigError(
                f"the demo makes its own {key} ({made}): for {requested}, write a config and `codec-dist run` it"
            )


def prepare_classifier(config: Config, index: ShardIndex) -> float:
    """Train the classifier on the fit part unless that was done; returns its accuracy on the evaluate part."""
    weights = Path(config.model.weights)
    record = weights.with_suffix(".json")
    settings = {
        "data": index.fingerprint,
        "split": hash_file(RunDirectory(config.run.directory).split),
        "preprocessing": config.model.preprocessing.model_dump() if config.model.preprocessing else None,
        "seed": config.run.seed,
        "epochs": EPOCHS,
    }
    if record.exists() and weights.exists():
        done = read_json(record)
        if done["fingerprint"] == hash_json(settings) and done["weights"] == hash_file(weights):
            return float(done["accuracy"])
    # The images are those that the model will see; its weights do not exist yet.
    untrained = config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})
    classifier = _train(untrained)
    reached = accuracy(classifier, *part_images(untrained, "evaluate"))
    write_bytes_atomically(weights, save(classifier.state_dict()))
    done = {"fingerprint": hash_json(settings), "weights": hash_file(weights), "accuracy": reached}
    write_json_atomically(record, done)
    return reached


def _train(config: Config) -> DigitsClassifier:
    images, labels = part_images(config, "fit")
    if len(images) < BATCH_SIZE:
        raise ConfigError(
            f"{len(images)} images are too few to train the classifier: raise data.limit or data.split.fit"
        )
    with Progress("train the classifier", total=EPOCHS, unit="epochs") as progress:
        classifier = train_classifier(
            images, labels, config.run.seed, lambda _, loss: progress.advance(1, f"cross-entropy {loss:.3f}")
        )
    if not all(bool(torch.isfinite(parameter).all()) for parameter in classifier.parameters()):
        raise RuntimeError("the classifier's training diverged")
    return classifier
