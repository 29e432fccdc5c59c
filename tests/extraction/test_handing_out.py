"""What the coordinator makes of shards that fail and of actors that die (see test_scheduling for who gets what)."""

import dataclasses
import io
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import extraction_without_ray
import pytest
from PIL import Image

from codec_dist.cli import main
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config, save_config
from codec_dist.extraction.calibration import calibrate
from codec_dist.extraction.coordinator import Coordinator
from codec_dist.extraction.plan import make_plan
from codec_dist.extraction.worker import Receipt
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore, Ledger, finish_store

MakeConfig = Callable[..., Config]
pytestmark = pytest.mark.ray


class Heard:
    """Keeps what a listener is told."""

    def __init__(self, when_failed: Callable[[], object] = lambda: None) -> None:
        self.finished: list[int] = []
        self.failed_attempts = 0
        self.lost: Counter[str] = Counter()
        self._when_failed = when_failed

    def enter(self, receipt: Receipt) -> None:
        self.finished.append(receipt.number)

    def attempt_failed(self) -> None:
        self.failed_attempts += 1
        self._when_failed()

    def actor_lost(self, cause: str) -> None:
        self.lost[cause] += 1


def _break(tar: Path) -> bytes:
    """Put something else than a header in the middle, at the same length: only reading the tar can tell."""
    whole = tar.read_bytes()
    middle = len(whole) // 2 // 512 * 512
    tar.write_bytes(whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :])
    return whole


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """Six shards of 20 digits, to be changed."""
    return shutil.copytree(packed, tmp_path / "shards")


@pytest.mark.slow
def test_failed_shard_is_tried_again_and_the_store_is_the_same(
    ray_cluster: Session, make_config_in: MakeConfig, make_config: MakeConfig, shards: Path, tmp_path: Path
) -> None:
    tar = shards / "digits-000001.tar"
    expected = extraction_without_ray.extract_here(make_config_in(tmp_path / "quiet", data={"shards": str(shards)}))
    plan, infos = make_plan(make_config(data={"shards": str(shards)}, cluster={"actors": 2, "attempts": 2}))
    plan, device = calibrate(plan, infos)
    whole = _break(tar)
    heard = Heard(when_failed=lambda: tar.write_bytes(whole))
    assert Coordinator(plan, infos, heard, device).run(range(6)) == []
    assert sorted(heard.finished) == list(range(6))
    assert (heard.failed_attempts, heard.lost) == (1, {})
    finish_store(plan.store)
    assert ContributionStore(plan.store).digest() == expected


@pytest.mark.slow
def test_shard_that_always_fails_is_given_up_and_named_when_the_others_are_done(
    ray_cluster: Session,
    make_config: MakeConfig,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tar = shards / "digits-000001.tar"
    whole = _break(tar)
    config = make_config(data={"shards": str(shards)}, cluster={"actors": 2, "attempts": 3})
    save_config(config, tmp_path / "config.yaml")
    command = ["extract", str(tmp_path / "config.yaml")]
    assert main(command) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 6 shards could not be done: digits-000001.tar: " in error
    ledger = Ledger(f"{config.run.directory}/store")
    assert ledger.done().keys() == {0, 2, 3, 4, 5}

    tar.write_bytes(whole)
    kept = ledger.done()
    assert main(command) == 0
    assert ledger.done().keys() == set(range(6))
    assert kept.items() <= ledger.done().items()


@pytest.mark.slow
def test_shard_that_kills_its_actors_is_found_out_and_no_other_is_blamed(
    ray_cluster: Session, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    samples, classes = digits()
    few = list(islice(samples, 40))
    white = io.BytesIO()
    Image.new("L", (8, 8), 255).save(white, "PNG")
    few[0] = dataclasses.replace(few[0], image=white.getvalue())
    folder = tmp_path / "shards"
    pack(few, folder, name="digits", samples_per_shard=10, classes=classes)
    config = make_config(
        data={"shards": str(folder)},
        model={"spec": "module:deadly_classifier:deadly_classifier"},
        cluster={"actors": 2, "attempts": 2},
    )
    plan, infos = make_plan(config)
    plan, device = calibrate(plan, infos)
    (deadly,) = (number for number, info in enumerate(infos) if f"{few[0].key}.png" in _members(folder / info.name))
    heard = Heard()
    (failed,) = Coordinator(plan, infos, heard, device).run(range(4))
    assert failed.name == infos[deadly].name
    assert failed.reason.startswith("its actor was lost: it crashed: ")
    assert "SIGSEGV" in failed.reason
    assert sorted([*heard.finished, deadly]) == [0, 1, 2, 3]
    # Where its first actor had another shard, too, neither counted as failed, and each was then handed out alone.
    assert heard.failed_attempts == 2
    assert heard.lost in ({"crashed": 2}, {"crashed": 3})
    assert not list(Path(config.run.directory).glob("*.crash"))


def _members(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        return opened.getnames()
