"""A stage that is sent to a cluster does what it does here."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.util.state import list_actors

from codec_dist.cli import main
from codec_dist.cluster_runtime import Session, submit_command
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    samples, classes = digits()
    few = [sample for sample in samples if int(sample.key.removeprefix("digit-")) < 60]
    pack(few, tmp_path / "shards", samples_per_shard=30, classes=classes)
    values = {
        "run": {"directory": "run"},
        "data": {"shards": "shards"},
        "model": {
            "spec": "module:codec_dist.demo.classifier:digits_classifier",
            "weights": "none",
            "preprocessing": {"size": 16, "channels": 1, "mean": [0.3], "std": [0.38]},
        },
        "attribution": {"layers": ["blocks.5"], "method": {"name": "integrated_gradients", "options": {"steps": 1}}},
        "cluster": {"actors": 1},
        "tracking": {"mode": "disabled"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


ANOTHER_CLUSTER = """
import sys
from codec_dist.cluster_runtime import ray_session
from codec_dist.config import ClusterSection
with ray_session(ClusterSection(), num_cpus=1):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_cluster() -> Iterator[None]:
    """A Ray of somebody else on this machine."""
    words = [sys.executable, "-c", ANOTHER_CLUSTER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()


@pytest.mark.ray
@pytest.mark.slow
def test_submitted_extraction_writes_the_store_of_a_local_one(ray_cluster: Session, config: Path) -> None:
    assert ray_cluster.dashboard is not None
    folder = config.parent
    assert main(["submit", "extract", str(config), "--address", ray_cluster.dashboard]) == 0
    assert main(["extract", str(config), "--run.directory", str(folder / "local")]) == 0
    submitted, local = (ContributionStore(folder / name / "store") for name in ("run", "local"))
    assert submitted.complete
    assert len(submitted.samples) == 60
    assert submitted.digest() == local.digest()


@pytest.mark.ray
@pytest.mark.slow
def test_a_file_of_the_jobs_folder_works_on_the_cluster_of_its_job(
    ray_cluster: Session, another_cluster: None, config: Path
) -> None:
    assert ray_cluster.dashboard is not None
    before = {actor.actor_id for actor in list_actors(address=ray_cluster.dashboard)}
    log: list[str] = []
    # As with `ray job submit --working-dir jobs -- python extract.py CONFIG`: no address is given.
    outcome = submit_command(
        ray_cluster.dashboard, ["python", "extract.py", str(config)], working_dir=JOBS, write=log.append
    )
    assert outcome.succeeded, "".join(log)
    assert ContributionStore(config.parent / "run" / "store").complete
    started = [actor for actor in list_actors(address=ray_cluster.dashboard) if actor.actor_id not in before]
    # One of them is Ray's own, in which the command runs; the others are those of the extraction.
    assert {actor.class_name for actor in started} > {"JobSupervisor"}
