"""The stages of a run in the order of the flow."""

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from codec_dist.attribution import METHODS, TARGETS
from codec_dist.config import Config
from codec_dist.extraction import extract
from codec_dist.interventions import RESULTS_FORMAT, results_are_current
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.images import unreadable_shards
from codec_dist.pipeline.inputs import StageInputs
from codec_dist.pipeline.intervening import intervene
from codec_dist.pipeline.preparing import prepare
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.pipeline.selected_saes import matching_saes
from codec_dist.pipeline.stage import RunFacts, Stage, StageContext
from codec_dist.pipeline.summarizing import check_summary, summarize
from codec_dist.pipeline.visualizing import visualize
from codec_dist.report import build_report
from codec_dist.sae import ARCHITECTURES
from codec_dist.store import ContributionStore, Ledger, samples_version, store_exists, verify_store
from codec_dist.training import check_parts, expand_grid, read_left_out, train_saes
from codec_dist.utils import hash_file, read_json, suggestion, write_json_atomically

# Wide enough for any option, and never allocated.
CHECKED_CHANNELS = 4096


def check_choices(config: Config) -> None:
    """Refuse names and options that no registry knows, before any work is done.

    Raises:
        CodecError: the nearest known names are given.
    """
    METHODS.build(config.attribution.method.name, config.attribution.method.options)
    for target in (config.attribution.target, *config.attribution.further_targets):
        TARGETS.build(target.name, target.options)
    with torch.device("meta"):
        for group in config.sae.groups:
            for point in expand_grid(group):
                ARCHITECTURES.build(point.architecture, point.options, channels=CHECKED_CHANNELS)


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
    summary = extract(context.config, context.tracker, session=context.ray, planned=context.planned)
    counts: dict[str, Any] = {"samples": summary.samples, "dropped": summary.dropped}
    counts |= {f"actors lost ({cause})": count for cause, count in summary.causes.items()}
    return counts if summary.accuracy is None else {**counts, "accuracy": round(summary.accuracy, 6)}


def _train(context: StageContext) -> dict[str, Any]:
    config, run = context.config, context.run
    with context.ray():
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
    folders = [sae.folder.relative_to(run.sae).as_posix() for sae in trained]
    write_json_atomically(run.sae / "trained.json", folders)
    left_out = len(read_left_out(run.sae))
    return {"SAEs": len(trained), **({"left out": left_out} if left_out else {})}


def _check_training(inputs: StageInputs) -> None:
    """Refuse SAEs that cannot be trained on what is stored or chosen as asked, and a split with an empty part."""
    _ = inputs.saes
    settings = inputs.config.sae
    if settings.selection.minimum_stability is not None and all(len(set(each.seeds)) < 2 for each in settings.groups):
        raise PipelineError(
            "sae.selection.minimum_stability compares SAEs of several seeds, but each of sae.groups has one: set "
            "sae.groups.0.seeds, e.g. to [0, 1, 2]"
        )
    check_parts(inputs.parts, f"the {sum(inputs.parts.values())} samples of {inputs.config.data.shards}")


def _check_saes(inputs: StageInputs, section: str) -> None:
    """Refuse layers and quantities of a section of the config that have no SAE."""
    settings = getattr(inputs.config, section)
    matching_saes(
        inputs.saes,
        settings.layers,
        settings.quantities,
        section,
        left_out=inputs.left_out,
        trained_yet=inputs.selected is not None,
    )


def _report(context: StageContext) -> dict[str, Any]:
    unreadable = unreadable_shards(context.config)
    notes = [] if unreadable is None else [f"Results are shown without a look at the shards: {unreadable}"]
    for note in notes:
        sys.stderr.write(f"report: {note}\n")
    build_report(context.run.path, context.config, context.current_stages(unreadable is None), notes)
    return {}


def _data_settings(facts: RunFacts) -> dict[str, Any]:
    reading = facts.config.data.model_dump(mode="json", include={"limit", "image_fields", "label_field"})
    return {"data": facts.index.fingerprint, **reading}


def _split_settings(facts: RunFacts) -> dict[str, Any]:
    return {**_data_settings(facts), "split": facts.config.data.split.model_dump(), "seed": facts.config.run.seed}


def _extract_settings(facts: RunFacts) -> dict[str, Any]:
    model = facts.model
    return {
        **_data_settings(facts),
        "model": model.fingerprint,
        "preprocessing": model.preprocessing.as_dict(),
        "attribution": facts.config.attribution.model_dump(mode="json"),
        "threads": facts.config.cluster.cpus_per_actor,
    }


def _train_settings(facts: RunFacts) -> dict[str, Any]:
    # How often a training is looked at does not change what comes of it.
    settings = facts.config.sae.model_dump(mode="json", include={"groups", "selection"})
    return {**settings, "seed": facts.config.run.seed}


def _summarize_settings(facts: RunFacts) -> dict[str, Any]:
    concepts = facts.config.modes.concepts
    return {
        # Which modes are marked as unstable is the report's business.
        "modes": facts.config.modes.model_dump(mode="json", exclude={"concepts", "unstable_below"}),
        "concepts": hash_file(Path(concepts)) if concepts and Path(concepts).is_file() else concepts,
        "classes": facts.index.classes,
        "images": facts.config.visualization.images,
    }


def _intervene_settings(facts: RunFacts) -> dict[str, Any]:
    settings = facts.config.interventions.model_dump(mode="json", exclude={"batch_size"})
    # Results in an earlier format are made again, not misread.
    return {"interventions": settings, "seed": facts.config.run.seed, "format": RESULTS_FORMAT}


def _visualize_settings(facts: RunFacts) -> dict[str, Any]:
    return {"visualization": facts.config.visualization.model_dump(mode="json")}


def _report_settings(facts: RunFacts) -> dict[str, Any]:
    # The report shows whatever is there, so it is built again when any stage has a new record or more shards are done.
    records = {stage.name: facts.run.record(stage.name) for stage in STAGES if stage.name != "report"}
    shown = {name: [record.fingerprint, record.seconds] if record else None for name, record in records.items()}
    shards = len(Ledger(facts.run.store)) if store_exists(facts.run.store) else 0
    return {"config": facts.config.model_dump(mode="json"), "stages": shown, "shards": shards}


def _store_is_complete(run: RunDirectory) -> bool:
    if samples_version(run.store) is None or not ContributionStore(run.store).complete:
        return False
    # What is missing or cut short is extracted again.
    return not verify_store(run.store, full=False).damaged


def _saes_are_there(run: RunDirectory) -> bool:
    if not (run.sae / "selected.json").exists() or not (run.sae / "trained.json").exists():
        return False
    return all((run.sae / folder / "model.safetensors").exists() for folder in read_json(run.sae / "trained.json"))


def _summary_is_there(run: RunDirectory) -> bool:
    tables = ("modes", "classes", "concepts", "layers", "coverage", "top_images", "statistics")
    files = [run.modes / f"{name}.parquet" for name in tables]
    return all(path.exists() for path in [*files, run.modes / "correlations.zarr", run.modes / "statistics.zarr"])


def _interventions_are_there(run: RunDirectory) -> bool:
    return results_are_current(run.interventions)


def _figures_are_there(run: RunDirectory) -> bool:
    if not (run.figures / "maps.json").exists():
        return False
    return all((run.figures / entry["map"]).exists() for entry in read_json(run.figures / "maps.json"))


STAGES: tuple[Stage, ...] = (
    Stage("prepare", (), _split_settings, lambda run: run.split.exists(), prepare, tracked=False),
    Stage("extract", (), _extract_settings, _store_is_complete, _extract),
    Stage(
        "train", ("prepare", "extract"), _train_settings, _saes_are_there, _train, _check_training, "sae", tracked=False
    ),
    Stage("summarize", ("train",), _summarize_settings, _summary_is_there, summarize, check_summary, "modes"),
    Stage(
        "intervene", ("summarize",), _intervene_settings, _interventions_are_there, intervene,
        functools.partial(_check_saes, section="interventions"), "interventions",
    ),
    Stage(
        "visualize", ("summarize",), _visualize_settings, _figures_are_there, visualize,
        functools.partial(_check_saes, section="visualization"), "visualization",
    ),
    Stage(
        "report", (), _report_settings, lambda run: run.report.exists(), _report, tracked=False, reads_records=True
    ),
)  # fmt: skip
