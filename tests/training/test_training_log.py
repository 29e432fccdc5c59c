"""What ranks leave is logged once, however the training ends."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from codec_dist.config import SaeGroup
from codec_dist.tracking import read_metrics
from codec_dist.training.collectives import Ranks
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask
from codec_dist.training.training_log import training_log

sys.path.insert(0, str(Path(__file__).parent))

from ranks_main import interrupted_at


def logged(run: Path) -> Counter[tuple[str, int]]:
    """How often each evaluation was logged: name of the SAE and epoch."""
    found: Counter[tuple[str, int]] = Counter()
    for entry in read_metrics(run / "metrics.jsonl"):
        names = [name for name in entry.get("metrics", {}) if name.endswith("/ev")]
        found.update((name.removesuffix("/ev"), entry["step"]) for name in names)
    return found


def test_what_an_interrupted_training_has_evaluated_is_logged_and_the_next_one_goes_on(
    make_run: Callable[..., Path], make_groups: Callable[..., tuple[SaeGroup, ...]],
    make_task: Callable[..., TrainingTask], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = make_run()
    task = make_task(run, make_groups()[:1], evaluations=6, checkpoints=6)
    with pytest.raises(KeyboardInterrupt), training_log(task):  # noqa: PT012
        with interrupted_at(14):
            train_on_rank(task, Ranks())
        raise KeyboardInterrupt
    entries = list(read_metrics(run / "metrics.jsonl"))
    assert (entries[0]["event"], entries[-1]["event"]) == ("start", "interrupted")
    before = logged(run)
    assert before
    # Of a training that was killed, notes may be left; and anything may be in a file.
    (task.scratch / "rank-log-000000-000000007.json").write_text('{"notes": [{"epoch": 1}]}')
    with training_log(task):
        train_on_rank(task, Ranks())
    assert "rank-log-000000-000000007.json cannot be read" in capsys.readouterr().err
    assert not list(task.scratch.glob("rank-log-*"))
    expected = Counter(
        (job.label, json.loads(line)["epoch"])
        for job in task.jobs
        for line in (task.folder(job) / "history.jsonl").read_text().splitlines()
    )
    assert logged(run) == expected
    assert before < expected
    assert list(read_metrics(run / "metrics.jsonl"))[-1]["event"] == "end"
