"""One coordinator at a time, and damage is done again: exactly the shards that have it, to the same digest."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from codec_dist.cli import main
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config, save_config
from codec_dist.extraction import extract, mend_store
from codec_dist.store import ContributionStore, Lease, LeaseError, verify_store

MakeConfig = Callable[..., Config]

# Takes the lease of a store, says so, and holds it until its input ends.
HOLDER = """
import sys
from codec_dist.store import Lease
with Lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _holder(store: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds the lease of a store; killed at the end, as by a crash."""
    command = [sys.executable, "-c", HOLDER, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_second_coordinator_is_refused_in_one_line(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    save_config(config, tmp_path / "config.yaml")
    with _holder(tmp_path / "run" / "store") as holder:
        with pytest.raises(LeaseError):
            extract(config)
        assert main(["extract", str(tmp_path / "config.yaml")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: the store ")
        assert f"process {holder.pid}" in line
        assert "is in use by" in line
    # The holder was killed: nothing was left that hinders the next.
    with Lease(tmp_path / "run" / "store"):
        pass


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def _chunk(store: Path, number: int, layer: str = "blocks.5") -> Path:
    (found,) = store.glob(f"arrays.zarr/layers/{layer}/contribution/*/positive/c.{number}.0")
    return found


@pytest.fixture(scope="module")
def finished(make_config_in: MakeConfig, ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a finished store; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    extract(make_config_in(run))
    return run


@pytest.mark.ray
@pytest.mark.slow
def test_damage_of_every_kind_is_done_again_to_the_same_digest(
    ray_cluster: Session, finished: Path, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    store, config = run / "store", make_config()
    expected = ContributionStore(store).digest()
    before = {path.name: path.stat().st_mtime_ns for path in (store / "ledger").glob("0*.json")}
    _truncate(_chunk(store, 1))
    _chunk(store, 2).unlink()
    _flip_a_bit(_chunk(store, 4, "blocks.3"))
    (store / "arrays.zarr" / ".c.9.0.torn.partial").write_bytes(b"torn")

    # Names and sizes tell of the first two.
    summary = extract(config)
    assert (summary.shards_done, summary.shards_skipped) == (2, 4)
    assert "2 shards are done again: digits-000001.tar" in capsys.readouterr().err
    assert not list(store.rglob("*.partial"))
    assert [problem.shard for problem in verify_store(store).problems] == ["digits-000004.tar"]

    summary = extract(config, verify=True)
    assert (summary.shards_done, summary.shards_skipped) == (1, 5)
    assert verify_store(store).ok
    assert ContributionStore(store).digest() == expected
    after = {path.name: path.stat().st_mtime_ns for path in (store / "ledger").glob("0*.json")}
    assert {name for name in before if before[name] != after[name]} == {f"{number:06d}.json" for number in (1, 2, 4)}


@pytest.mark.ray
@pytest.mark.slow
def test_command_line_repairs_a_run_that_was_done(
    ray_cluster: Session, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file, store = str(tmp_path / "config.yaml"), tmp_path / "run" / "store"
    save_config(make_config(), tmp_path / "config.yaml")
    assert main(["extract", config_file]) == 0
    expected = ContributionStore(store).digest()
    _chunk(store, 0).unlink()
    assert main(["extract", config_file]) == 0
    assert ContributionStore(store).digest() == expected
    _flip_a_bit(_chunk(store, 5))
    capsys.readouterr()
    assert main(["extract", config_file]) == 0
    assert "extract: done already" in capsys.readouterr().err
    assert main(["extract", config_file, "--verify"]) == 0
    assert "1 shards are done again: digits-000005.tar" in capsys.readouterr().err
    assert ContributionStore(store).digest() == expected
    assert verify_store(store).ok


@pytest.mark.ray
def test_mending_a_sound_store_changes_nothing(ray_cluster: Session, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*")}
    assert mend_store(finished / "store", full=True).ok
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*")}
