"""Runs stages in order, and skips those that are done for this config and these inputs; or submits one as a Ray job."""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from codec_dist.cluster_runtime import JobOutcome, submit_job
from codec_dist.config import Config, ConfigError, load_config, save_config, shown_config
from codec_dist.extraction import Plan, make_plan
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.fingerprints import StageFingerprints
from codec_dist.pipeline.images import load_run_model, run_index
from codec_dist.pipeline.inputs import planned_inputs, present_inputs
from codec_dist.pipeline.run_directory import RunDirectory, StageRecord
from codec_dist.pipeline.stage import RunFacts, Stage, StageContext
from codec_dist.pipeline.stages import STAGES, check_choices
from codec_dist.shards import ShardInfo
from codec_dist.store import samples_version
from codec_dist.tracking import Tracker
from codec_dist.utils import naming_full_disk

# Options of models that follow from their weights.
FOLLOWING_OPTIONS = ("transform_input",)

Planned = tuple[Plan, tuple[ShardInfo, ...]]

NOT_SENT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "wandb", "runs", "*.zarr", "*.tar")


def run_stages(config: Config, names: Sequence[str] | None = None) -> list[StageRecord]:
    """Run some stages of a run, or all; a stage that is done is skipped.

    A stage is done when its record bears the hash of its own settings and its inputs' fingerprints, and
    its files exist. Killed at any moment, the same call goes on where it stopped.

    Args:
        config: the whole config; only sections that a stage reads decide whether it is done.
        names: stage names in any order; default: all, in the order of the flow.

    Returns:
        The records of the stages asked for, in the order of the flow.

    Raises:
        PipelineError: an earlier stage that is needed was not run for this config.
        CodecError: what the stages themselves refuse.
    """
    check_choices(config)
    run = RunDirectory(config.run.directory, config.store.location)
    facts, notes = _look_up(config, run, names)
    config, fingerprints = facts.config, StageFingerprints(facts, STAGES)
    requested = [stage for stage in STAGES if names is None or stage.name in names]
    planned = _check_ahead(facts, fingerprints, requested)
    for note in notes:
        _say(f"extract: {note}")
    # A config that turns out to be refused must not take the place of the one that the run was made with.
    if not run.config.exists():
        _save_config(config, run)
    records = []
    with contextlib.ExitStack() as resources:
        context = StageContext(config, run, None, fingerprints.current_stages, resources, planned)
        for stage in requested:
            # What is written by libraries of others names no file, or nothing at all.
            with naming_full_disk(run.path, own=True):
                records.append(_run_stage(stage, context, fingerprints))
    _save_config(config, run)
    return records


def check_config(config: Config) -> None:
    """Refuse what any stage of a run would refuse, as far as config, model, weights and data tell it.

    Raises:
        CodecError: as from the stage, which was not started.
    """
    check_choices(config)
    run = RunDirectory(config.run.directory, config.store.location)
    facts, _ = _look_up(config, run, None)
    _check_ahead(facts, StageFingerprints(facts, STAGES), STAGES)


def current_stages(config: Config, run: RunDirectory, readable: bool = True) -> set[str]:
    """The stages of a run whose results belong to this config and to each other.

    Where the shards are not ``readable``, nothing speaks against the stages that are there.
    """
    return StageFingerprints(RunFacts(config, run), STAGES).current_stages(readable)


def _check_ahead(facts: RunFacts, fingerprints: StageFingerprints, requested: Sequence[Stage]) -> Planned | None:
    """Let every stage from the first one on that is asked for refuse what it cannot do; the extraction, as planned.

    So do later stages that are not asked for, where the config says anything about them: they are to use what these
    make.
    """
    config, run, names = facts.config, facts.run, {stage.name for stage in requested}
    following = STAGES[STAGES.index(requested[0]) :] if requested else ()
    if "extract" not in names and not any(stage.check for stage in requested):
        return None
    split = run.split if fingerprints.is_current("prepare") else None
    planned: Planned | None = None
    if "extract" in names and (samples_version(run.store) is None or not fingerprints.is_current("extract")):
        planned = make_plan(config)
        inputs = planned_inputs(config, planned[0], split)
    else:
        for stage in requested[:1]:
            # Refuses what an earlier stage has not made yet.
            fingerprints.of(stage.name)
        inputs = present_inputs(config, run, split, trained=not names & {"extract", "train"})
    for stage in following:
        if stage.check is not None and (stage.name in names or stage.is_configured(config)):
            stage.check(inputs)
    return planned


def _look_up(config: Config, run: RunDirectory, names: Sequence[str] | None) -> tuple[RunFacts, tuple[str, ...]]:
    """What the config leaves to shards and model, and what is to be said of the model where images are explained.

    The model's own settings (preprocessing, options that follow from its weights) become part of the config. Later
    stages find them in the run's own config, and need no model for that.
    """
    stages = {stage.name for stage in STAGES} if names is None else set(names)
    if "extract" not in stages:
        return RunFacts(_with_saved_model(config, run), run), ()
    index = run_index(config)  # shards that are not there are said before weights are fetched
    loaded = load_run_model(config)
    return RunFacts(config.model_copy(update={"model": loaded.section}), run, index), tuple(loaded.notes)


def _with_saved_model(config: Config, run: RunDirectory) -> Config:
    """The model's settings of the run's own config, where that was resolved from the same."""
    try:
        saved = load_config(run.config).model
    except ConfigError:
        return config
    given = config.model
    followed = {name: value for name, value in saved.options.items() if name in FOLLOWING_OPTIONS}
    expected = given.model_copy(
        update={
            "options": {**followed, **given.options},
            "preprocessing": given.preprocessing or saved.preprocessing,
        }
    )
    return config.model_copy(update={"model": saved}) if expected == saved else config


def _save_config(config: Config, run: RunDirectory) -> None:
    """Write the resolved config, unless the one that is there says the same (in its own words)."""
    # Where the work ran is no part of the run: another machine has other addresses.
    kept = shown_config(config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": None})}))
    try:
        if load_config(run.config) == kept:
            return
    except ConfigError:
        pass
    save_config(kept, run.config)


def _run_stage(stage: Stage, context: StageContext, fingerprints: StageFingerprints) -> StageRecord:
    config, run = context.config, context.run
    fingerprint = fingerprints.of(stage.name)
    record = run.record(stage.name)
    if record and record.fingerprint == fingerprint and stage.complete(run):
        _say(f"{stage.name}: done already")
        return record
    if stage.check is not None:
        stage.check(present_inputs(config, run, run.split, trained=stage.name != "train"))
    run.forget(stage.name)
    started = time.monotonic()
    with contextlib.ExitStack() as tracking:
        if stage.tracked:
            tracker = Tracker(
                run.path,
                config.tracking,
                stage=stage.name,
                group=config.run.name,
                config=config.model_dump(mode="json"),
            )
            context.tracker = tracking.enter_context(tracker)
        summary = stage.work(context)
        if context.tracker is not None:
            context.tracker.summary({key: value for key, value in summary.items() if isinstance(value, int | float)})
        context.tracker = None
        # Before the tracker closes: what is done is done, however long logging takes to end.
        record = run.finish(stage.name, fingerprint, started, summary)
    shown = ", ".join(f"{value:,} {key}" for key, value in summary.items() if isinstance(value, int))
    _say(f"{stage.name}: done in {record.seconds:.1f} s" + (f" ({shown})" if shown else ""))
    return record


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


# ---- A stage as a Ray job on a cluster


def submit_stage(
    stage: str, config: Config, address: str, *, code: Path | None = None, wait: bool = True
) -> JobOutcome:
    """Run a stage (or ``run``, all of them) on a cluster whose nodes reach the config's paths.

    The resolved config travels with the job, so the cluster needs no copy of the file.

    Args:
        stage: name of the command.
        config: the resolved config.
        address: URL of the cluster's job server.
        code: folder with the user's own modules (for ``module:`` models), sent along.
        wait: follow the job's log until it ends; else return once it is accepted.

    Raises:
        PipelineError: ``code`` is no folder.
        ClusterError: nothing answers at the address, or the job is refused.
    """
    check_choices(config)
    with tempfile.TemporaryDirectory(prefix="codec_dist-job-") as folder:
        sent = Path(folder) / "job"
        if code is None:
            sent.mkdir()
        elif not code.is_dir():
            raise PipelineError(f"the folder {code} that is to go with the job does not exist")
        else:
            shutil.copytree(code, sent, ignore=NOT_SENT)
        name = "codec_dist_config.yaml"
        # It is the job's own input: without them its nodes could not read what the config names.
        save_config(config, sent / name, with_credentials=True)
        return submit_job(address, stage, name, working_dir=sent, follow=wait)
