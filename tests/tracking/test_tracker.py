"""What the tracker promises, shown on real W&B runs that are offline."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from wandb_files import offline_files, records

from codec_dist.config import TrackingSection
from codec_dist.tracking import RunSeries, Tracker, TrackingError, read_metrics

OFFLINE = TrackingSection()
DISABLED = TrackingSection(mode="disabled")


def history(path: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(path):
        row: dict[str, Any] = {}
        for item in record.history.item:
            *route, last = [item.key] if item.key else item.nested_key
            inner = row
            for name in route:
                inner = inner.setdefault(name, {})
            inner[last] = json.loads(item.value_json)
        rows += [row] if record.HasField("history") else []
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which two stages, one after the other in this process, logged everything there is to log."""
    directory = tmp_path_factory.mktemp("run")
    picture = directory / "figures" / "one.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4), (200, 30, 30)).save(picture)
    (directory / "store").mkdir()
    (directory / "store" / "big.bin").write_bytes(b"\0" * 100_000)
    with Tracker(directory, OFFLINE, stage="extract", group="digits", config={"steps": 10}) as tracker:
        tracker.artifact("shards", "shards", "s3://user:secret@bucket/digits?signature=abc")
        tracker.artifact("store", "store", directory / "store", uses=["shards"])
    with Tracker(directory, OFFLINE, stage="train", group="digits", config={"lr": float("nan")}) as tracker:
        for layer in ("blocks.0", "blocks.1"):  # the axis starts again for the second series
            for epoch in range(500):
                tracker.log({f"train/{layer}/loss": 1 / (epoch + 1)}, step=epoch, axis="epoch")
        tracker.histogram("modes/correlation", np.linspace(0, 1, 1000), bins=512)
        tracker.table(
            "modes/top", ["mode", "class", "image", "mixed"], [[3, "seven", picture, 1.5], [4.5, None, None, "a"]]
        )
        tracker.summary({"ev": np.float32(0.5)})
        tracker.artifact("sae", "sae", picture, uses=["store"])
    return directory


def test_each_stage_is_one_offline_run_of_its_job_type_in_the_group(run: Path) -> None:
    started = [next(record.run for record in records(path) if record.HasField("run")) for path in offline_files(run)]
    assert [(one.job_type, one.run_group, one.project) for one in started] == [
        ("extract", "digits", "codec_dist"),
        ("train", "digits", "codec_dist"),
    ]


def test_offline_file_is_complete_and_holds_the_whole_history(run: Path) -> None:
    path = offline_files(run)[-1]
    assert list(records(path))[-1].HasField("exit")
    for layer in ("blocks.0", "blocks.1"):
        series = [(row["epoch"], row[f"train/{layer}/loss"]) for row in history(path) if f"train/{layer}/loss" in row]
        assert series == [(epoch, 1 / (epoch + 1)) for epoch in range(500)]


def test_custom_axis_is_defined_for_each_metric(run: Path) -> None:
    defined = {
        record.metric.name: record.metric.step_metric
        for record in records(offline_files(run)[-1])
        if record.HasField("metric")
    }
    assert defined[r"train/blocks\.0/loss"] == "epoch"  # an unescaped dot would name a nested value
    assert defined[r"train/blocks\.1/loss"] == "epoch"


def test_offline_file_holds_the_table_with_its_image(run: Path) -> None:
    path = offline_files(run)[-1]
    logged = next(row["modes/top"] for row in history(path) if "modes/top" in row)
    assert logged["_type"] == "table-file"
    files = {
        entry.path: Path(entry.local_path)
        for record in records(path)
        if record.artifact.type == "run_table"
        for entry in record.artifact.manifest.contents
    }
    assert all(file.is_relative_to(run / "wandb") for file in files.values())  # kept with the run, to be synced later
    table = json.loads(files["modes/top.table.json"].read_text())
    assert table["columns"] == ["mode", "class", "image", "mixed"]
    first, second = table["data"]
    assert (first[:2], first[3], second) == ([3, "seven"], "1.5", [4.5, None, None, "a"])
    assert first[2]["_type"] == "image-file"
    assert files[first[2]["path"]].read_bytes() == (run / "figures/one.png").read_bytes()


def test_offline_file_holds_the_histogram(run: Path) -> None:
    logged = next(row["modes/correlation"] for row in history(offline_files(run)[-1]) if "modes/correlation" in row)
    assert logged["_type"] == "histogram"
    assert sum(logged["values"]) == 1000
    assert len(logged["bins"]) == 513


def test_artifacts_refer_to_local_files_and_name_what_they_were_made_from(run: Path) -> None:
    extract, train = (
        {record.artifact.name: record.artifact for record in records(path) if record.HasField("artifact")}
        for path in offline_files(run)
    )
    assert json.loads(extract["store"].metadata)["uses"] == ["shards"]
    entry = extract["store"].manifest.contents[0]
    assert entry.ref == (run / "store/big.bin").resolve().as_uri()
    assert json.loads(train["sae"].metadata)["uses"] == ["store"]
    big = [path for path in (run / "wandb").rglob("*") if path.is_file() and path.stat().st_size >= 100_000]
    assert [path for path in big if b"\0" * 100_000 in path.read_bytes()] == []


def test_secrets_of_a_url_are_not_sent(run: Path) -> None:
    for path in offline_files(run):
        content = path.read_bytes()
        assert b"secret" not in content
        assert b"signature=abc" not in content


def test_nothing_is_said_about_code_git_or_machine(run: Path) -> None:
    for path in offline_files(run):
        assert not (path.parent / "files" / "wandb-metadata.json").exists()
        assert not (path.parent / "files" / "requirements.txt").exists()
        assert not list(path.parent.glob("files/code/**/*"))
        assert not any(record.HasField("stats") for record in records(path))


def test_the_same_numbers_are_in_the_journal(run: Path) -> None:
    entries = list(read_metrics(run / "metrics.jsonl"))
    logged = [entry for entry in entries if "metrics" in entry]
    assert len(logged) == 1000
    assert logged[3]["stage"] == "train"
    assert (logged[3]["axis"], logged[3]["step"]) == ("epoch", 3)
    assert logged[3]["metrics"] == {"train/blocks.0/loss": 0.25}
    assert next(entry["summary"] for entry in entries if "summary" in entry) == {"ev": 0.5}
    table = next(entry["table"] for entry in entries if "table" in entry)
    assert table["rows"] == [[3, "seven", "figures/one.png", 1.5], [4.5, None, None, "a"]]
    assert [entry["event"] for entry in entries if "event" in entry] == ["start", "end", "start", "end"]


OFFLINE_RUN = """
import sys
from pathlib import Path
import wandb
from codec_dist.config import TrackingSection
from codec_dist.tracking import Tracker
for stage in ("extract", "train"):
    with Tracker(Path(sys.argv[1]), TrackingSection(), stage=stage, group="g", config={}) as tracker:
        tracker.log({"x": 1.0})
        tracker.table("t", ["n"], [[1]])
"""


def test_offline_mode_never_calls_its_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment["WANDB_MODE"] = "online"  # the config decides
        # To the end of the process, since W&B reports about itself when Python exits.
        subprocess.run([sys.executable, "-c", OFFLINE_RUN, str(tmp_path)], env=environment, check=True, timeout=120)
        assert len(offline_files(tmp_path)) == 2
        with pytest.raises(BlockingIOError):  # nobody has knocked
            server.accept()


def test_environment_is_left_as_it_was(run: Path) -> None:
    assert "WANDB_DATA_DIR" not in os.environ
    assert "WANDB_ERROR_REPORTING" not in os.environ


def test_disabled_mode_writes_the_journal_and_nothing_of_wandb(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, stage="extract", group="g", config={}) as tracker:
        tracker.log({"rate": 3.0}, step=1)
        tracker.histogram("h", [1.0, float("nan"), 2.0], bins=2)
        tracker.histogram("empty", [])
    entries = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert entries[1]["metrics"] == {"rate": 3.0}
    assert entries[2]["histogram"]["counts"] == [1, 1]
    assert sum(entries[3]["histogram"]["counts"]) == 0


def test_failed_stage_is_marked_and_its_error_comes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, OFFLINE, stage="train", group="g", config={}) as tracker:
        tracker.log({"loss": 1 / 0})
    assert list(read_metrics(tmp_path / "metrics.jsonl"))[-1]["event"] == "failed"
    last = list(records(offline_files(tmp_path)[0]))[-1]
    assert last.exit.exit_code == 1


def test_a_tracker_inside_another_ends_neither_early(tmp_path: Path) -> None:
    with Tracker(tmp_path / "a", OFFLINE, stage="outer", group="g", config={}) as outer:
        with Tracker(tmp_path / "b", OFFLINE, stage="inner", group="g", config={}) as inner:
            inner.log({"x": 1})
        outer.log({"x": 2})
    for name, value in (("a", 2), ("b", 1)):
        (path,) = offline_files(tmp_path / name)
        assert [row["x"] for row in history(path)] == [value]
        assert list(records(path))[-1].HasField("exit")


def test_users_own_wandb_run_survives(tmp_path: Path) -> None:
    own = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    try:
        with Tracker(tmp_path / "run", OFFLINE, stage="extract", group="g", config={}) as tracker:
            tracker.log({"x": 1})
        assert wandb.run is own
        own.log({"mine": 3})
    finally:
        path = Path(own.settings.sync_file)
        own.finish()
        wandb.teardown()
    assert [row["mine"] for row in history(path)] == [3]


def test_workers_started_during_a_stage_can_track_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracker(tmp_path / "a", OFFLINE, stage="extract", group="g", config={}):
        assert "WANDB_SERVICE" not in os.environ  # what a child process would inherit
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/tmp/of-a-service-that-has-ended/socket")
    with Tracker(tmp_path / "b", OFFLINE, stage="train", group="g", config={}) as tracker:
        tracker.log({"x": 1})
    (path,) = offline_files(tmp_path / "b")
    assert [row["x"] for row in history(path)] == [1]


def test_rows_beyond_the_limit_of_wandb_are_left_out_and_counted(tmp_path: Path) -> None:
    with Tracker(tmp_path, DISABLED, stage="s", group="g", config={}) as tracker:
        tracker.table("t", ["n"], [[n] for n in range(10_003)])
    table = next(entry["table"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "table" in entry)
    assert (len(table["rows"]), table["rows_left_out"]) == (10_000, 3)


ONLINE = """
import sys
from pathlib import Path
from codec_dist.config import TrackingSection
from codec_dist.tracking import Tracker, TrackingError
try:
    with Tracker(Path(sys.argv[1]), TrackingSection(mode="online"), stage="s", group="g", config={}):
        print("started")
except TrackingError as error:
    print(error)
"""


def test_online_without_credentials_is_one_clear_line_and_no_question(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", ONLINE, str(tmp_path / "run")],
        env=environment, input="", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.count("\n") == 1
    assert "wandb login" in result.stdout
    assert "--tracking.mode offline" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tracker: tracker.histogram("h", [1.0], bins=513), "512"),
        (lambda tracker: tracker.table("t", ["a", "b"], [[1]]), "row 0 has 1 cells for 2 columns"),
        (lambda tracker: tracker.table("t", ["a"], [[Path("/none/x.png")]]), "/none/x.png"),
        (lambda tracker: tracker.artifact("a", "store", Path("/none/store")), "/none/store"),
    ],
)
def test_what_cannot_be_logged_is_refused_in_words(tmp_path: Path, call: Any, words: str) -> None:
    with Tracker(tmp_path, DISABLED, stage="s", group="g", config={}) as tracker, pytest.raises(TrackingError) as error:
        call(tracker)
    assert words in str(error.value)


def test_a_tracker_that_is_not_open_refuses(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="with"):
        Tracker(tmp_path, DISABLED, stage="s", group="g", config={}).log({"x": 1})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrackingError, match="file"),
        Tracker(tmp_path / "file", DISABLED, stage="s", group="g", config={}),
    ):
        pass


def test_a_series_leaves_a_complete_file_for_each_run_and_no_service_behind(tmp_path: Path) -> None:
    with RunSeries(tmp_path, OFFLINE, stage="sae", group="digits") as series:
        for number in range(3):
            with series.run(f"sae {number}", {"k": number}) as run:
                run.log({"ev": number / 2}, 7, "epoch")
    files = offline_files(tmp_path)
    assert len(files) == 3
    for file in files:
        assert list(records(file))[-1].HasField("exit")
        started = next(record.run for record in records(file) if record.HasField("run"))
        number = int(started.display_name.removeprefix("sae "))
        assert (started.job_type, started.run_group) == ("sae", "digits")
        assert [row["ev"] for row in history(file) if "ev" in row] == [number / 2]
    assert "WANDB_SERVICE" not in os.environ


def test_a_series_within_a_tracker_leaves_the_trackers_run_open(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFFLINE, stage="train", group="digits", config={}) as tracker:
        with RunSeries(tmp_path, OFFLINE, stage="sae", group="digits") as series, series.run("one", {}) as run:
            run.log({"ev": 0.5}, 1, "epoch")
        tracker.log({"after": 1.0}, step=1, axis="epoch")
    found = {name for file in offline_files(tmp_path) for row in history(file) for name in row}
    assert {"ev", "after"} <= found


def test_what_is_for_the_journal_only_does_not_reach_wandb(tmp_path: Path) -> None:
    with Tracker(tmp_path, OFFLINE, stage="train", group="digits", config={}) as tracker:
        tracker.log({"hidden": 1.0, "also": 2.0}, step=1, axis="epoch", journal_only=True)
        tracker.histogram("hidden/histogram", [1.0, 2.0], step=1, axis="epoch", journal_only=True)
        tracker.log({"shown": 1.0}, step=1, axis="epoch")
    (file,) = offline_files(tmp_path)
    assert {name for row in history(file) for name in row if not name.startswith("_")} == {"shown", "epoch"}
    entries = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [entry["metrics"] for entry in entries if "metrics" in entry] == [{"hidden": 1.0, "also": 2.0}, {"shown": 1}]
    assert [entry["histogram"]["name"] for entry in entries if "histogram" in entry] == ["hidden/histogram"]
