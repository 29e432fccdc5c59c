"""A run whose shards and store are in a bucket: the digest of one on disk, through a server that is often busy."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from digits_config import digits_values

from codec_dist.cli import main
from codec_dist.config import Choice, Config, SaeGroup, TrackingSection, TrainingSettings, parse_config, save_config
from codec_dist.modes import FoldInputs, SummaryTask, summarize_shards
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore, Ledger, verify_store
from codec_dist.store.objects import ObjectPlace
from codec_dist.training.collectives import Ranks
from codec_dist.training.parts import read_parts
from codec_dist.training.rank import train_on_rank
from codec_dist.training.sae_jobs import TrainingTask, plan_jobs

pytest.importorskip("s3fs", reason="stores in buckets need s3fs (extra s3)")
pytest.importorskip("moto.server", reason="a local S3 server needs moto, flask and flask-cors")

import extraction_without_ray
import s3_server
import s3fs

pytestmark = pytest.mark.slow

SHARDS = f"s3://{s3_server.BUCKET}/shards"
STORE = f"s3://{s3_server.BUCKET}/run/store"


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.Proxy]:
    with s3_server.reachable() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 10 digits."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    samples, classes = digits()
    pack(islice(samples, 20), folder, name="digits", samples_per_shard=10, classes=classes)
    return folder


def make_config(run: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "run": {"directory": str(run)},
        "cluster": {"actors": 1},
        "tracking": {"mode": "disabled"},
    }
    return parse_config(digits_values(values, sections))


@pytest.fixture(scope="module")
def expected(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the same extraction on disk."""
    config = make_config(tmp_path_factory.mktemp("local"), data={"shards": str(packed)})
    return extraction_without_ray.extract_here(config)


@pytest.fixture(scope="module")
def shards(server: s3_server.Proxy, packed: Path) -> str:
    """The same shards in the bucket."""
    files = s3fs.S3FileSystem()
    for path in packed.iterdir():
        files.put_file(str(path), f"{SHARDS.removeprefix('s3://')}/{path.name}")
    return SHARDS


@pytest.fixture(scope="module")
def run(server: s3_server.Proxy, shards: str, expected: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was extracted through the command line, while every fourth request was refused."""
    folder = tmp_path_factory.mktemp("run")
    save_config(make_config(folder, data={"shards": shards}, store={"location": STORE}), folder / "config.yaml")
    server.busy_every, server.refused = 4, 0
    extract_by_command(folder)
    assert server.refused > 20
    server.busy_every = 0
    return folder


def extract_by_command(folder: Path) -> str:
    """In a process with a Ray of its own, whose actors have its environment; returns what it told."""
    command = [sys.executable, "-m", "codec_dist", "extract", str(folder / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_worker_writes_through_a_busy_server_what_it_writes_on_disk(
    server: s3_server.Proxy, shards: str, expected: str, tmp_path: Path
) -> None:
    location = f"s3://{s3_server.BUCKET}/worker/store"
    server.busy_every, server.refused = 4, 0
    digest = extraction_without_ray.extract_here(
        make_config(tmp_path, data={"shards": shards}, store={"location": location})
    )
    server.busy_every = 0
    assert digest == expected
    assert server.refused > 20
    assert verify_store(location).ok
    assert not (tmp_path / "store").exists()


def test_it_is_the_store_of_a_run_on_disk(run: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ContributionStore(STORE).digest() == expected
    assert verify_store(STORE).ok
    assert not (run / "store").exists()
    assert main(["extract", str(run / "config.yaml")]) == 0
    assert "extract: done already" in capsys.readouterr().err
    assert main(["store", "digest", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert main(["store", "verify", str(run)]) == 0
    assert main(["store", "info", str(run)]) == 0
    assert STORE in capsys.readouterr().out


def test_later_stages_read_it_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = SaeGroup(
        architecture=Choice(name="topk", options={"modes": 6, "k": 2, "dead_window": 60}),
        layers=("blocks.5",),
        quantities=("contribution-positive",),
        training=TrainingSettings(epochs=1, batch_size=8),
    )
    store, split = ContributionStore(STORE), run / "split.parquet"
    jobs = plan_jobs(store, (group,), read_parts(store, split).split_hash, seed=0)
    task = TrainingTask(run, STORE, split, tuple(jobs), "run", 0, 1, 1, TrackingSection(mode="disabled"))
    train_on_rank(task, Ranks())
    folder = task.folder(jobs[0])
    assert (folder / "model.safetensors").exists()
    summary = summarize_shards(FoldInputs(STORE, split, 10), SummaryTask("blocks.5", "contribution-positive", folder))
    assert summary.modes is not None
    assert main(["report", str(run / "config.yaml")]) == 0
    assert store.identity_hash[:12] in (run / "report" / "index.html").read_text()


def test_what_is_lost_in_the_bucket_is_extracted_again(
    server: s3_server.Proxy, run: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ObjectPlace(STORE)
    place.delete("arrays.zarr/layers/blocks.5/activation/positive/c.1.0")
    assert main(["store", "verify", "--quick", str(run)]) == 1
    assert "is missing" in capsys.readouterr().out
    server.busy_every = 7
    told = extract_by_command(run)
    server.busy_every = 0
    assert "1 problems in the store" in told
    assert len(Ledger(STORE)) == 2
    assert ContributionStore(STORE).digest() == expected
    assert verify_store(STORE).ok
