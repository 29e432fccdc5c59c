"""What a run tells of itself: rates, where the time went, failures."""

from pathlib import Path

import pytest

from codec_dist.config import TrackingSection
from codec_dist.extraction import ExtractionError
from codec_dist.extraction.summary import Account
from codec_dist.extraction.worker import Receipt, Stopwatch, TimeSplit
from codec_dist.shards import ShardInfo
from codec_dist.tracking import Tracker, read_metrics
from codec_dist.utils import Progress

SHARDS = tuple(ShardInfo(f"a-{number}.tar", 10, 1, "") for number in range(4))


def _receipt(number: int, actor: int, times: TimeSplit, dropped: int = 0) -> Receipt:
    named = tuple((f"key-{place}", "torn") for place in range(dropped))
    return Receipt(number, 10 - dropped, named, times.decode_wait + times.compute, actor, times)


def test_time_of_each_actor_is_divided_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = TrackingSection(mode="disabled")
    with (
        Tracker(tmp_path, section, stage="extract", group="", config={}) as tracker,
        Progress("extract", 40, "images") as progress,
    ):
        account = Account(0.1, SHARDS, {}, tracker)
        account.progress = progress
        account.enter(_receipt(0, 0, TimeSplit(decode_wait=1, compute=3, write=2)))
        account.attempt_failed()
        account.actor_lost("killed for memory")
        account.enter(_receipt(1, 1, TimeSplit(decode_wait=0, compute=4, write=1, idle=4), dropped=1))
        account.enter(_receipt(2, 0, TimeSplit(decode_wait=1, compute=2, write=2, idle=1)))
        summary = account.summary(failed=1, seconds=10)
    assert (summary.shards_done, summary.samples, summary.dropped, summary.failed) == (3, 29, 1, 1)
    assert (summary.retries, summary.actors_lost, summary.images_per_second) == (1, 1, 3.0)
    # 16 seconds of actors: 2 waiting, 9 computing, 5 idle; 5 of writing beside them.
    assert summary.decode_wait_fraction == pytest.approx(2 / 16)
    assert summary.compute_fraction == pytest.approx(9 / 16)
    assert summary.idle_fraction == pytest.approx(5 / 16)
    assert summary.write_fraction == pytest.approx(5 / 16)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 of 4 shards, compute 56%, decode wait 12%, write 31%, idle 31%" in line
    assert line.endswith("1 dropped, 1 failed attempts, 1 actors lost (1 killed for memory)")
    assert summary.causes == {"killed for memory": 1}

    entries = list(read_metrics(tmp_path / "metrics.jsonl"))
    points = [entry["metrics"] for entry in entries if "metrics" in entry]
    assert [point["extract/actor"] for point in points] == [0, 1, 0]
    assert [point["extract/shard_seconds"] for point in points] == [4, 4, 3]
    assert points[1]["extract/actor_idle_fraction"] == pytest.approx(0.5)
    assert points[2]["extract/actor_compute_fraction"] == pytest.approx(5 / 8)
    assert points[2]["extract/failed_attempts"] == 1
    (table,) = [entry["table"] for entry in entries if "table" in entry]
    assert [row[:3] for row in table["rows"]] == [[0, 2, 20], [1, 1, 10]]
    assert table["rows"][1][3] == pytest.approx(10 / 8)


def test_too_many_bad_samples_end_the_run() -> None:
    account = Account(0.05, SHARDS, {}, None)
    account.enter(_receipt(0, 0, TimeSplit(), dropped=2))
    with pytest.raises(ExtractionError, match=r"3 of 40 samples .* \(0\.05\) .*key-0 in a-0\.tar: torn"):
        account.enter(_receipt(1, 0, TimeSplit(), dropped=1))


def test_stopwatch_counts_also_what_ends_in_an_error() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="torn"), watch.measure("compute"):
        raise ValueError("torn")
    watch.add("idle", 2.0)
    watch.add("idle", 1.0)
    split = watch.split()
    assert split.compute > 0
    assert (split.idle, split.write) == (3.0, 0.0)
    assert sum(split.fractions().values()) == pytest.approx(1.0)
