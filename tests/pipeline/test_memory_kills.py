"""Where Ray kills workers for memory, extraction and training end in one line that says so and what to do."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from digits_config import digits_values

from codec_dist.shards import digits, pack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VALUES = digits_values(
    {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "attribution": {"layers": ["blocks.5"]},
        "sae": {
            "groups": [{"architecture": {"name": "topk", "options": {"modes": 16, "k": 2}}, "training": {"epochs": 2}}]
        },
        "cluster": {"training_workers": 1, "actors": 1, "attempts": 1},
        "tracking": {"mode": "disabled"},
    }
)
# Any machine uses more than a hundredth of its memory, so whatever starts is killed.
TIGHT = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}


def run(config: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "codec_dist", words[0], str(config), *words[1:]]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_workers_that_ray_kills_for_memory_are_told_as_such(tmp_path: Path) -> None:
    samples, classes = digits()
    pack(itertools.islice(samples, 100), tmp_path / "shards", samples_per_shard=50, classes=classes)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(VALUES))
    ended = run(config, "extract", **TIGHT)
    last = ended.stderr.splitlines()[-1]
    assert (ended.returncode, last[:7]) == (2, "error: "), ended.stderr
    assert "for memory" in last
    assert "attribution.microbatch" in last
    assert "microbatch 64 chosen" in ended.stderr

    ended = run(config, "extract")
    assert ended.returncode == 0, ended.stderr
    ended = run(config, "train", **TIGHT)
    last = ended.stderr.splitlines()[-1]
    assert (ended.returncode, last[:7]) == (2, "error: "), ended.stderr
    assert "for memory" in last
    assert "training_workers" in last


FOLD = """
import time
from codec_dist.cluster_runtime import ClusterError, map_fold, ray_session
from codec_dist.config import ClusterSection
with ray_session(ClusterSection()):
    try:
        map_fold([0], lambda item: time.sleep(60))
    except ClusterError as error:
        print(error)
"""


def test_a_task_that_ray_kills_for_memory_is_one_line_without_rays_own_text() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FOLD], env=os.environ | TIGHT, capture_output=True, text=True, timeout=120
    )
    assert "for memory" in ended.stdout, ended.stderr
    assert ended.stdout.count("\n") == 1
    assert len(ended.stdout) < 400
    assert "raylet" not in ended.stdout + ended.stderr
