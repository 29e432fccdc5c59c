"""What comes from outside: the environment of W&B, names that are any text, credentials in URLs, interruptions."""

import json
import re
from pathlib import Path

import pytest
from wandb_files import offline_files, records

from codec_dist.config import TrackingSection
from codec_dist.tracking import RunSeries, Tracker, read_metrics, sweep_environment

OFFLINE = TrackingSection()
LEFT_OVER = {
    "WANDB_PROJECT": "another",
    "WANDB_ENTITY": "somebody",
    "WANDB_RUN_ID": "leftover",
    "WANDB_RESUME": "must",
    "WANDB_NAME": "another name",
    "WANDB_RUN_GROUP": "another group",
    "WANDB_JOB_TYPE": "another job",
    "WANDB_TAGS": "one,two",
    "WANDB_MODE": "online",
    "WANDB_DIR": "/nowhere",
    "WANDB_SWEEP_PARAM_PATH": "/nowhere/parameters.yaml",
    "WANDB_NOTES": "kept",
}
NAMES = ["réseau", "reseau", "🐘 elephants", "a/b c", "x" * 200, "日本語", "a-b", "a b"]


def started(run: Path) -> list:
    return [next(record.run for record in records(path) if record.HasField("run")) for path in offline_files(run)]


def test_the_config_decides_what_a_run_is_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LEFT_OVER.items():
        monkeypatch.setenv(name, value)
    section = TrackingSection(project="mine", entity="us", tags=("own",))
    for stage in ("extract", "train"):
        with Tracker(tmp_path, section, stage=stage, group="digits", config={}):
            pass
    with RunSeries(tmp_path, section, stage="sae", group="digits") as series, series.run("one", {}):
        pass
    runs = started(tmp_path)
    assert [(run.project, run.entity, run.run_group, run.job_type) for run in runs] == [
        ("mine", "us", "digits", stage) for stage in ("extract", "train", "sae")
    ]
    assert [run.display_name for run in runs] == ["digits-extract", "digits-train", "one"]
    assert all(list(run.tags) == ["own"] and run.notes == "kept" for run in runs)
    assert len({run.run_id for run in runs} - {"leftover"}) == 3


def test_the_entity_of_the_environment_counts_where_the_config_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ENTITY", "somebody")
    with Tracker(tmp_path, OFFLINE, stage="extract", group="digits", config={}):
        pass
    assert [run.entity for run in started(tmp_path)] == ["somebody"]


def test_the_run_of_a_sweeps_agent_is_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "agents", "WANDB_PROJECT": "swept", "WANDB_ENTITY": "team"}
    assert sweep_environment() == {}
    for name, value in agent.items():
        monkeypatch.setenv(name, value)
    assert sweep_environment() == agent
    for stage in ("extract", "train", "summarize"):
        with Tracker(tmp_path, OFFLINE, stage=stage, group="digits", config={}):
            pass
    with RunSeries(tmp_path, OFFLINE, stage="sae", group="digits") as series, series.run("one", {}):
        pass
    runs = {run.job_type: run for run in started(tmp_path)}
    train = runs.pop("train")
    assert (train.run_id, train.sweep_id, train.project, train.entity) == ("agents", "sweep1", "swept", "team")
    assert all((run.project, run.sweep_id) == ("codec_dist", "") for run in runs.values())
    assert len({run.run_id for run in runs.values()} - {"agents"}) == 3


def test_any_text_names_runs_groups_and_artifacts(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_text("x")
    for name in NAMES:
        with Tracker(tmp_path, OFFLINE, stage="extract", group=name, config={}) as tracker:
            tracker.artifact(f"{name}-shards", "shards", "s3://bucket/shards")
            tracker.artifact(f"{name}-store", "store", tmp_path / "store", uses=[f"{name}-shards"])
    runs = started(tmp_path)
    assert sorted(run.display_name for run in runs) == sorted(f"{name}-extract"[:127] + "…" * (len(name) > 119)
                                                              for name in NAMES)  # fmt: skip
    groups = [run.run_group for run in runs]
    logged = [record for path in offline_files(tmp_path) for record in records(path)]
    artifacts = [record.artifact.name for record in logged if record.HasField("artifact")]
    assert len(set(groups)) == len(NAMES)
    assert len(set(artifacts)) == 2 * len(NAMES)
    for identifier in [*groups, *artifacts]:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", identifier), identifier


def test_credentials_reach_no_file_of_the_run(tmp_path: Path) -> None:
    urls = ["https://user:tiger@host/a", "https://host/b?X-Amz-Signature=tiger", "s3://key:tiger@bucket/c"]
    settings = {"data": {"shards": urls[0]}, "list": urls}
    with Tracker(tmp_path, OFFLINE, stage="extract", group=f"run of {urls[0]}", config=settings) as tracker:
        for number, url in enumerate(urls):
            tracker.artifact(f"shards {number}", "shards", url)
            tracker.artifact(f"made of {url}", "store", url, uses=[f"shards {number}"])
        tracker.table("shards", ["url", "rows"], [[url, 1] for url in urls])
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"tiger" not in file.read_bytes(), file
    (path,) = offline_files(tmp_path)
    logged = [record.artifact for record in records(path) if record.HasField("artifact")]
    assert {json.loads(artifact.metadata)["location"] for artifact in logged if artifact.type == "shards"} == {
        "https://host/a", "https://host/b", "s3://bucket/c",
    }  # fmt: skip


def test_an_interrupted_stage_is_closed_as_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(tmp_path, OFFLINE, stage="train", group="g", config={}):
        raise KeyboardInterrupt
    assert list(read_metrics(tmp_path / "metrics.jsonl"))[-1]["event"] == "interrupted"
    assert list(records(offline_files(tmp_path)[0]))[-1].exit.exit_code == 255  # W&B's own code for Ctrl-C
