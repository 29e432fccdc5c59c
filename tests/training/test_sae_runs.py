"""One W&B run for every SAE of a sweep, read back from the offline files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record
from wandb_files import offline_files, records

from codec_dist.config import Choice, SaeGroup, TrackingSection, TrainingSettings
from codec_dist.tracking import read_metrics
from codec_dist.training.collectives import Ranks
from codec_dist.training.model_selection import select_saes
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask
from codec_dist.training.training_log import runs_apart, training_log, write_sae_runs

OFFLINE = TrackingSection()
LAYER, QUANTITY = "blocks.0", "contribution-positive"


def sweep_over(*ks: int) -> tuple[SaeGroup, ...]:
    """SAEs that differ in one option, and not in what tells architectures apart."""
    fast = TrainingSettings(epochs=4, batch_size=16, learning_rate=0.02)
    return tuple(
        SaeGroup(
            architecture=Choice(name="topk", options={"modes": 10, "k": k}),
            layers=(LAYER,),
            quantities=(QUANTITY,),
            training=fast,
        )
        for k in ks
    )


def runs_of(run: Path, job_type: str) -> list[list[Record]]:
    """The records of all offline W&B runs of a job type."""
    runs = [list(records(file)) for file in offline_files(run)]
    return [each for each in runs if header(each).job_type == job_type]


def header(records: list[Record]) -> Any:
    return next(record.run for record in records if record.HasField("run"))


def config(records: list[Record]) -> dict[str, Any]:
    return {item.key: json.loads(item.value_json) for item in header(records).config.update}


def series(records: list[Record]) -> dict[str, dict[int, Any]]:
    """Name → epoch → value of everything logged by epoch."""
    found: dict[str, dict[int, Any]] = {}
    for record in records:
        row: dict[str, Any] = {}
        for item in record.history.item:
            *route, last = [item.key] if item.key else item.nested_key
            inner = row
            for name in route:
                inner = inner.setdefault(name, {})
            inner[last] = json.loads(item.value_json)
        for name, value in row.items():
            if "epoch" in row:
                found.setdefault(name, {})[row["epoch"]] = value
    return found


def summary(records: list[Record]) -> dict[str, Any]:
    updates = [item for record in records for item in record.summary.update]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def test_every_sae_of_a_sweep_gets_one_run_with_its_curves_histograms_and_results(
    make_run: Callable[..., Path], make_task: Callable[..., TrainingTask]
) -> None:
    run = make_run()
    task = make_task(run, sweep_over(1, 2, 3), tracking=OFFLINE)
    task.scratch.mkdir(parents=True)
    with training_log(task):
        train_on_rank(task, Ranks())
    folders = {job: run / "sae" / job.folder for job in task.jobs}
    chosen = select_saes(run / "sae", list(folders.values()))
    assert write_sae_runs(run, OFFLINE, "digits", task.jobs, chosen) == 3

    by_folder = {config(records)["folder"]: records for records in runs_of(run, "sae")}
    assert set(by_folder) == {job.folder.as_posix() for job in task.jobs}
    for job, folder in folders.items():
        records = by_folder[job.folder.as_posix()]
        assert header(records).run_group == "digits"
        assert records[-1].HasField("exit")  # the file is complete
        assert config(records)["options"] == job.options
        logged = series(records)
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        for name in ("ev", "l0", "dead_fraction", "loss", "learning_rate", "modes_alive", "samples_per_second"):
            assert logged[name] == {entry["epoch"]: entry[name] for entry in history}, name
        metrics = json.loads((folder / "metrics.json").read_text())
        for name in ("log10_frequency", "top_correlation", "hoyer"):
            assert set(logged[name]) == {2, 4}
        assert sum(logged["log10_frequency"][4]["values"]) == metrics["select"]["modes_alive"]
        assert sum(logged["log10_samples_since_fired"][4]["values"]) == 10
        final = summary(records)
        assert final["evaluate/ev"] == metrics["evaluate"]["ev"]
        assert final["selected"] == (folder in chosen.values())
    # Names do not grow with the number of SAEs or modes.
    assert len({name for records in by_folder.values() for name in series(records)}) < 40
    # Nothing is written twice.
    assert write_sae_runs(run, OFFLINE, "digits", task.jobs, chosen) == 0

    # Meanwhile the training's own run shows an overview, and metrics.jsonl everything.
    (training,) = runs_of(run, "train")
    overview = series(training)
    evs = [json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["ev"] for folder in folders.values()]
    assert overview[f"{LAYER}/{QUANTITY}/highest_ev"][4] == max(evs)
    assert overview[f"{LAYER}/{QUANTITY}/median_ev"][4] == sorted(evs)[1]
    assert not any(name.endswith("/hoyer") for name in overview)
    histograms = [entry for entry in read_metrics(run / "metrics.jsonl") if "histogram" in entry]
    assert {entry["step"] for entry in histograms} == {2, 4}


def test_runs_apart_are_for_sweeps_unless_asked_otherwise(
    make_run: Callable[..., Path],
    make_groups: Callable[..., tuple[SaeGroup, ...]],
    make_task: Callable[..., TrainingTask],
) -> None:
    run = make_run()
    few, sweep = make_task(run, make_groups()).jobs, make_task(run, sweep_over(1, 2)).jobs
    assert not runs_apart(OFFLINE, few)  # two architectures, at one layer once each
    assert runs_apart(OFFLINE, sweep)
    assert runs_apart(TrackingSection(per_sae="always"), few)
    assert not runs_apart(TrackingSection(per_sae="never"), sweep)
    assert not runs_apart(TrackingSection(mode="disabled", per_sae="always"), sweep)
    assert write_sae_runs(run, TrackingSection(per_sae="never"), "digits", sweep, {}) == 0
    assert not (run / "wandb").exists()
