"""What training logs: evaluations on their way from the ranks to the driver, which alone uses the tracker.

In a sweep every SAE gets a W&B run of its own, written when training has ended, from the files of the run. Why not
while they train: hundreds of runs would be open at once, each with a process's attention, for numbers that come every
few minutes. The training's own run shows an overview meanwhile, and metrics.jsonl has all of it.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from codec_dist.config import TrackingSection
from codec_dist.tracking import RunSeries, Tracker, WandbRun, read_metrics
from codec_dist.training.held_out_metrics import Evaluation
from codec_dist.training.sae_jobs import SaeJob, TrainingTask
from codec_dist.utils import Progress, read_json, write_bytes_atomically, write_json_atomically

TOP_MODE_COLUMNS = ("epoch", "layer", "quantity", "architecture", "mode", "class", "correlation", "frequency", "hoyer")
OVERVIEW = ("ev", "l0", "dead_fraction")

RANK_LOG_FILES = "rank-log-*.json"

PROGRESS_SUFFIX = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0

TRACKED_FILE = "tracked.json"

Histograms = dict[str, dict[int, dict[str, Any]]]


@contextmanager
def training_log(task: TrainingTask) -> Iterator["Logbook"]:
    """The tracker of a training for the length of a block, which is how the training ends for the tracker, too.

    The driver has it, not a rank: so whatever ends the ranks (Ctrl-C, SIGTERM, a crash, a node that is gone), the W&B
    run is closed and says how it ended. At the end of the block what the ranks have left is logged.
    """
    with Tracker(task.directory, task.tracking, stage="train", group=task.name, config=_settings(task)) as tracker:
        logbook = Logbook(tracker, task.scratch, apart=runs_apart(task.tracking, task.jobs))
        try:
            yield logbook
        except BaseException:
            with suppress(Exception):  # what ended the block is the error to show
                logbook.catch_up()
            raise
        logbook.catch_up()


@dataclass(frozen=True)
class Note:
    """One evaluation of one SAE on held-out rows."""

    layer: str
    quantity: str
    architecture: str
    label: str
    """Its name in logs."""
    folder: str
    """Relative to the run's ``sae`` folder; unique."""
    epoch: int
    numbers: Mapping[str, float]
    """Scalars by name; undefined ones are left out."""
    histograms: Mapping[str, list[float]]
    """Per-mode values by name."""
    top_modes: list[list[Any]]
    """Mode, class, correlation, frequency and Hoyer of the modes that correlate most with a class."""

    @classmethod
    def of(cls, job: SaeJob, epoch: int, numbers: Mapping[str, float], evaluation: Evaluation) -> "Note":
        """``numbers``: those of the evaluation, and what training adds."""
        return cls(
            layer=job.layer,
            quantity=job.quantity,
            architecture=job.architecture,
            label=job.label,
            folder=job.folder.as_posix(),
            epoch=epoch,
            numbers=dict(numbers),
            histograms={name: values.tolist() for name, values in evaluation.histograms().items()},
            top_modes=evaluation.top_modes(),
        )


class Logbook:
    """Evaluations for the tracker.

    Args:
        tracker: the training's.
        scratch: folder in which the ranks leave notes and progress.
        apart: whether every SAE gets a W&B run of its own when training ends. Then the training's own W&B run
            shows an overview while it goes on, since names for every SAE of a sweep would be too many.
    """

    def __init__(self, tracker: Tracker, scratch: Path, *, apart: bool = False) -> None:
        self._tracker, self._scratch, self._apart = tracker, scratch, apart
        # When progress was last looked at, and how many epochs were done.
        self._looked: tuple[float, int] | None = None

    def catch_up(self) -> None:
        """Log what the ranks have left since the last call."""
        if self._looked is None and ranks_count(self._scratch):
            self._looked = (time.monotonic(), read_progress(self._scratch))
        for notes in unheard_notes(self._scratch):
            self.enter(notes)

    def enter(self, notes: Sequence[Note]) -> None:
        """Log evaluations of SAEs that advance together.

        The numbers and histograms of each; then what they have in common: a table of the modes that correlate
        most with a class, how fast the training goes, and an overview where SAEs have runs apart.
        """
        if not notes:
            return
        for note in notes:
            self._enter_numbers(note)
        epoch = max(note.epoch for note in notes)
        rows = [
            [note.epoch, note.layer, note.quantity, note.architecture, *mode]
            for note in notes
            for mode in note.top_modes
        ]
        if rows:
            self._tracker.table("top_modes", list(TOP_MODE_COLUMNS), rows)
        self._log_speed(epoch)
        if self._apart:
            self._tracker.log(_overview(notes), step=epoch, axis="epoch")

    def _enter_numbers(self, note: Note) -> None:
        # In metrics.jsonl alone, names may be as long as it takes to be unique.
        prefix = note.folder if self._apart else note.label
        named = {f"{prefix}/{name}": value for name, value in note.numbers.items()}
        self._tracker.log(named, step=note.epoch, axis="epoch", journal_only=self._apart)
        for name, values in note.histograms.items():
            self._tracker.histogram(f"{prefix}/{name}", values, step=note.epoch, axis="epoch", journal_only=self._apart)

    def _log_speed(self, epoch: int) -> None:
        now, done = time.monotonic(), read_progress(self._scratch)
        before, done_before = self._looked or (now, done)
        if done > done_before:
            speed = (done - done_before) / max(now - before, 1e-9)
            self._tracker.log({"sae_epochs_per_second": speed}, step=epoch, axis="epoch")
        self._looked = now, done


def _settings(task: TrainingTask) -> dict[str, Any]:
    saes = {job.label: {"options": dict(job.options), **job.settings.model_dump(mode="json")} for job in task.jobs}
    return {"seed": task.seed, "saes": saes}


def _overview(notes: Sequence[Note]) -> dict[str, float]:
    """The highest explained variance and the medians, for each layer and quantity."""
    by_key: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        by_key.setdefault((note.layer, note.quantity), []).append(note)
    found: dict[str, Any] = {}
    for (layer, quantity), group in by_key.items():
        for name in OVERVIEW:
            if values := [note.numbers[name] for note in group if name in note.numbers]:
                found[f"{layer}/{quantity}/median_{name}"] = float(median(values))
                if name == "ev":
                    found[f"{layer}/{quantity}/highest_ev"] = float(max(values))
    return found


# ---- From the ranks to the driver


class RankLog:
    """Leaves notes of evaluations in files of the scratch folder, each of which is there before what follows from it.

    Args:
        scratch: the folder.
        rank: who writes.
        done: epochs of all SAEs that were done before.
    """

    def __init__(self, scratch: Path, rank: int, done: int = 0) -> None:
        self._scratch, self._name = scratch, f"rank-log-{rank:06d}"
        # What was left by a rank of this number that died may not have been heard yet.
        unheard = [int(path.stem.rpartition("-")[2]) for path in scratch.glob(f"{self._name}-*.json")]
        self._next = 1 + max(unheard, default=-1)
        self.epochs = EpochCount(scratch, rank, done)

    def enter(self, notes: Sequence[Note]) -> None:
        """Leave the evaluations of SAEs that advance together."""
        if not notes:
            return
        self.epochs.show()
        path = self._scratch / f"{self._name}-{self._next:09d}.json"
        write_bytes_atomically(path, json.dumps({"notes": [vars(note) for note in notes]}).encode())
        self._next += 1


def unheard_notes(scratch: Path) -> Iterator[list[Note]]:
    """What the ranks have left so far; what was taken is removed with the next step of the iterator."""
    for path in sorted(scratch.glob(RANK_LOG_FILES)):
        try:
            notes = [Note(**note) for note in read_json(path)["notes"]]
        except (ValueError, KeyError, TypeError):
            # Of a training that was killed, by another version of this program.
            sys.stderr.write(f"train: {path} cannot be read: the evaluations in it are not logged\n")
            notes = []
        yield notes
        path.unlink()


# ---- How many epochs of all SAEs are done


class EpochCount:
    """The epochs that one rank has counted, in a file of its own."""

    def __init__(self, scratch: Path, rank: int, done: int = 0) -> None:
        """Begin with ``done`` epochs, instead of what a rank of this number had counted before it died."""
        self._path = scratch / f"{rank}-{PROGRESS_SUFFIX}"
        self.done = done
        """Epochs of SAEs counted so far."""
        self.show()

    def advance(self, sae_epochs: int) -> None:
        """Count epochs of SAEs as done; the file follows about once a second."""
        self.done += sae_epochs
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.show()

    def show(self) -> None:
        """Let the driver know of all epochs counted so far."""
        self._written = time.monotonic()
        write_json_atomically(self._path, {"done": self.done})


def ranks_count(scratch: Path) -> bool:
    """Whether any rank has begun to count."""
    return any(scratch.glob(f"*-{PROGRESS_SUFFIX}"))


def read_progress(scratch: Path) -> int:
    """SAE epochs that all ranks have counted so far."""
    done = 0
    for path in scratch.glob(f"*-{PROGRESS_SUFFIX}"):
        try:
            done += int(read_json(path)["done"])
        except (OSError, ValueError, KeyError):
            continue
    return done


# ---- A W&B run for every SAE of a sweep


def runs_apart(section: TrackingSection, jobs: Sequence[SaeJob]) -> bool:
    """Whether every SAE gets a W&B run of its own; by default in a sweep: several of one architecture and quantity."""
    if section.mode == "disabled" or section.per_sae == "never":
        return False
    kinds = {(job.key, job.architecture) for job in jobs}
    return section.per_sae == "always" or len(kinds) < len(jobs)


def write_sae_runs(
    directory: Path, section: TrackingSection, name: str, jobs: Sequence[SaeJob], in_use: Mapping[tuple[str, str], Path]
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
            with series.run(job.label, _settings_of_sae(job)) as run:
                _write(
                    run, folders[job], histograms.get(job.folder.as_posix(), {}), in_use.get(job.key) == folders[job]
                )
            file = run.file.resolve().relative_to(directory.resolve()).as_posix()
            write_json_atomically(folders[job] / TRACKED_FILE, {"file": file})
            progress.advance()
    return len(missing)


def _settings_of_sae(job: SaeJob) -> dict[str, Any]:
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
