"""A W&B run for every SAE of a sweep, written by the driver when training has ended, from the files of the run.

Why not while they train: hundreds of runs would be open at once, each with a process's attention, for numbers that
come every few minutes. The training's own run shows an overview meanwhile, and metrics.jsonl has all of it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codec_dist.config import TrackingSection
from codec_dist.tracking import RunSeries, WandbRun, read_metrics
from codec_dist.training.sae_jobs import SaeJob
from codec_dist.utils import Progress, read_json, write_json_atomically

TRACKED_FILE = "tracked.json"

Histograms = dict[str, dict[int, dict[str, Any]]]


def runs_apart(section: TrackingSection, jobs: Sequence[SaeJob]) -> bool:
    """Whether every SAE gets a W&B run of its own; by default in a sweep: several of one architecture and quantity."""
    if section.mode == "disabled" or section.per_sae == "never":
        return False
    kinds = {(job.key, job.architecture) for job in jobs}
    return section.per_sae == "always" or len(kinds) < len(jobs)


def write_sae_runs(
    directory: Path, section: TrackingSection, name: str, jobs: Sequence[SaeJob], chosen: Mapping[tuple[str, str], Path]
) -> int:
    """Write the W&B runs of finished SAEs that have none yet; returns how many.

    They have the job type ``sae`` and share the group ``name`` with the stages. Each holds the SAE's settings,
    its curves (with samples per second), histograms of its modes at every evaluation (how long they have been
    silent among them), and its metrics on both parts as summary. ``tracked.json`` in the SAE's folder marks it.

    Raises:
        TrackingError: as from W&B.
    """
    folders = {job: directory / "sae" / job.folder for job in jobs}
    missing = [job for job in jobs if not (folders[job] / TRACKED_FILE).exists()]
    if not missing or not runs_apart(section, jobs):
        return 0
    histograms = _read_histograms(directory / "metrics.jsonl")
    with (
        Progress("W&B runs", total=len(missing), unit="SAEs") as progress,
        RunSeries(directory, section, stage="sae", group=name) as series,
    ):
        for job in missing:
            with series.run(job.label, _settings(job)) as run:
                _write(
                    run, folders[job], histograms.get(job.folder.as_posix(), {}), chosen.get(job.key) == folders[job]
                )
            file = run.file.resolve().relative_to(directory.resolve()).as_posix()
            write_json_atomically(folders[job] / TRACKED_FILE, {"file": file})
            progress.advance()
    return len(missing)


def _settings(job: SaeJob) -> dict[str, Any]:
    place = {"layer": job.layer, "quantity": job.quantity, "architecture": job.architecture}
    training = job.settings.model_dump(mode="json")
    more = {"folder": job.folder.as_posix(), "seed": job.seed, "digest": job.digest}
    return {**place, "options": dict(job.options), "training": training, **more}


def _write(run: WandbRun, folder: Path, histograms: Histograms, selected: bool) -> None:
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    for entry in history:
        numbers = {name: value for name, value in entry.items() if name != "epoch" and value is not None}
        run.log(numbers, entry["epoch"], "epoch")
        for name, by_epoch in histograms.items():
            if (found := by_epoch.get(entry["epoch"])) is not None:
                run.histogram(name, np.array(found["counts"]), np.array(found["edges"]), entry["epoch"], "epoch")
    metrics = read_json(folder / "metrics.json")
    summary = {
        f"{part}/{name}": value
        for part in ("select", "evaluate")
        for name, value in metrics[part].items()
        if isinstance(value, int | float)
    }
    run.summary({**summary, "selected": selected})


def _read_histograms(path: Path) -> dict[str, Histograms]:
    """Folder → name → epoch → counts and edges, as last logged by a training with runs apart."""
    found: dict[str, Histograms] = {}
    for entry in read_metrics(path):
        if entry.get("stage") == "train" and "histogram" in entry and entry.get("step") is not None:
            folder, _, name = entry["histogram"]["name"].rpartition("/")
            found.setdefault(folder, {}).setdefault(name, {})[entry["step"]] = entry["histogram"]
    return found
