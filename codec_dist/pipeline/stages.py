"""The stages of a run in the order of the flow."""

from pathlib import Path
from typing import Any

import torch

from codec_dist.attribution import METHODS, TARGETS
from codec_dist.config import Config
from codec_dist.extraction import extract
from codec_dist.pipeline.data import prepare
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.images import run_index
from codec_dist.pipeline.intervening import intervene
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.pipeline.stage import Stage, StageContext
from codec_dist.pipeline.summarizing import summarize
from codec_dist.pipeline.visualizing import visualize
from codec_dist.report import build_report
from codec_dist.sae import ARCHITECTURES
from codec_dist.training import train_saes
from codec_dist.utils import hash_file, suggestion

# Wide enough for any option, and never allocated.
CHECKED_CHANNELS = 4096


def check_choices(config: Config) -> None:
    """Refuse names and options that no registry knows, before any work is done.

    Raises:
        CodecError: the nearest known names are given.
    """
    METHODS.build(config.attribution.method.name, config.attribution.method.options)
    TARGETS.build(config.attribution.target.name, config.attribution.target.options)
    with torch.device("meta"):
        for group in config.sae.groups:
            ARCHITECTURES.build(group.architecture.name, group.architecture.options, channels=CHECKED_CHANNELS)


def stages_of_command(command: str) -> list[str]:
    """The stages that a command of the command line runs, in order.

    Raises:
        PipelineError: no such command.
    """
    names = [stage.name for stage in STAGES]
    if command == "run":
        return names
    if command not in names:
        raise PipelineError(f"unknown stage {command!r}: {suggestion(command, [*names, 'run'])}")
    return ["prepare", "extract"] if command == "extract" else [command]


def _extract(context: StageContext) -> dict[str, Any]:
    context.need_ray()
    summary = extract(context.config, context.tracker)
    return {"samples": summary.samples, "dropped": summary.dropped}


def _train(context: StageContext) -> dict[str, Any]:
    config, run = context.config, context.run
    context.need_ray()
    trained = train_saes(
        run.store,
        run.split,
        config.sae.groups,
        config.sae,
        run.path,
        config.run.seed,
        config.cluster,
        config.tracking,
        name=config.run.name,
        correlation_threshold=config.modes.correlation_threshold,
    )
    return {"SAEs": len(trained)}


def _report(context: StageContext) -> dict[str, Any]:
    build_report(context.run.path, context.config)
    return {}


def _data_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    reading = config.data.model_dump(mode="json", include={"limit", "image_fields", "label_field"})
    return {"data": run_index(config).fingerprint, **reading}


def _split_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    return {**_data_settings(config, run), "split": config.data.split.model_dump(), "seed": config.run.seed}


def _extract_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    model = config.model.model_dump(mode="json")
    weights = Path(config.model.weights)
    if weights.is_file():
        model["weights"] = hash_file(weights)
    if config.model.weights == "none":
        model["seed"] = config.run.seed
    return {
        **_data_settings(config, run),
        "model": model,
        "attribution": config.attribution.model_dump(mode="json"),
        "threads": config.cluster.cpus_per_actor,
        "max_bad_fraction": config.data.max_bad_fraction,
    }


def _train_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    return {"sae": config.sae.model_dump(mode="json"), "seed": config.run.seed}


def _summarize_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    concepts = config.modes.concepts
    return {
        "modes": config.modes.model_dump(mode="json", exclude={"concepts"}),
        "concepts": hash_file(Path(concepts)) if concepts and Path(concepts).is_file() else concepts,
        "images": config.visualization.images,
    }


def _intervene_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    return {"interventions": config.interventions.model_dump(mode="json"), "seed": config.run.seed}


def _visualize_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    return {"visualization": config.visualization.model_dump(mode="json")}


def _report_settings(config: Config, run: RunDirectory) -> dict[str, Any]:
    # The report shows whatever is there, so it is built anew when any stage has a new record.
    records = {stage.name: run.record(stage.name) for stage in STAGES if stage.name != "report"}
    shown = {name: [record.fingerprint, record.seconds] if record else None for name, record in records.items()}
    return {"config": config.model_dump(mode="json"), "stages": shown}


STAGES: tuple[Stage, ...] = (
    Stage("prepare", (), _split_settings, lambda run: (run.split,), prepare, tracked=False),
    Stage("extract", (), _extract_settings, lambda run: (run.store / "samples.parquet",), _extract),
    Stage(
        "train",
        ("prepare", "extract"),
        _train_settings,
        lambda run: (run.sae / "selected.json",),
        _train,
        tracked=False,
    ),
    Stage(
        "summarize",
        ("train",),
        _summarize_settings,
        lambda run: (run.modes / "modes.parquet", run.modes / "statistics.parquet"),
        summarize,
    ),
    Stage(
        "intervene",
        ("summarize",),
        _intervene_settings,
        lambda run: tuple(run.interventions / f"{name}.parquet" for name in ("trials", "curves", "auc")),
        intervene,
    ),
    Stage("visualize", ("summarize",), _visualize_settings, lambda run: (run.figures / "maps.json",), visualize),
    Stage("report", (), _report_settings, lambda run: (run.report,), _report, tracked=False),
)
