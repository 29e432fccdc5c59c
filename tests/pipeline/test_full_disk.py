"""A full disk ends every stage in one line that names a path and what to do, and the same command then goes on."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from digits_config import digits_values
from small_disk import small_disk

from codec_dist.cli import main
from codec_dist.shards import digits, pack

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VALUES = digits_values(
    {
        "run": {"directory": "disk/run"},
        "data": {"shards": "shards"},
        "attribution": {"layers": ["blocks.5"]},
        "sae": {
            "groups": [{"architecture": {"name": "topk", "options": {"modes": 16, "k": 2}}, "training": {"epochs": 2}}]
        },
        "interventions": {"percentages": [50], "off_targets": 1, "random_draws": 1, "images_per_class": 2},
        "visualization": {"modes": 1, "images": 1},
        "cluster": {"training_workers": 1, "attempts": 1},
    }
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Iterator[Path]:
    """The config of a finished run on a disk of its own, with a copy of the run beside that disk."""
    folder = tmp_path_factory.mktemp("full disk")
    with small_disk(folder / "disk", "200m"):
        samples, classes = digits()
        pack(itertools.islice(samples, 200), folder / "shards", samples_per_shard=100, classes=classes)
        (folder / "config.yaml").write_text(yaml.safe_dump(VALUES))
        assert main(["run", str(folder / "config.yaml")]) == 0
        shutil.copytree(folder / "disk" / "run", folder / "copy", symlinks=True)
        yield folder / "config.yaml"


@pytest.fixture
def config(finished: Path) -> Path:
    """The finished run as it was, whatever others did to it: after ``train``, all later stages would be out of date."""
    run = finished.parent / "disk" / "run"
    shutil.rmtree(run)
    shutil.copytree(finished.parent / "copy", run, symlinks=True)
    return finished


CHANGES = {
    "train": ("--run.seed", "1"),
    "summarize": ("--modes.correlation_threshold", ".3"),
    "intervene": ("--interventions.random_draws", "2"),
    "visualize": ("--visualization.contrast", "6"),
    "report": ("--report.title", "another"),
}


@pytest.mark.parametrize("free", [0, 12 << 10, 100 << 10], ids=["full", "12 KB", "100 KB"])
@pytest.mark.parametrize("stage", list(CHANGES))
def test_a_stage_that_finds_the_disk_full_says_so_in_one_line(
    config: Path, stage: str, free: int, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = config.parent / "disk"
    words = [stage, str(config), *CHANGES[stage]]
    if stage == "train":
        # Another seed is another split, so everything before would be other, too.
        words = [stage, str(config), "--sae.groups.0.seeds", f"[{1 + free}]"]
    (disk / "run" / "stages" / f"{stage}.json").unlink(missing_ok=True)
    capsys.readouterr()
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        status = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize - free))
    try:
        code = main(words)
    finally:
        filler.unlink()
    last = capsys.readouterr().err.splitlines()[-1]
    if code == 0:  # what it writes fits
        assert free
        return
    assert code == 2, last
    assert last.startswith("error: ")
    assert str(disk / "run") in last
    assert "free space" in last
    assert not list((disk / "run").rglob("*.partial"))
    assert main(words) == 0
