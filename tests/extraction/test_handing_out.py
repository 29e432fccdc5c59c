"""Whom the coordinator gives which shard: two at a time at most, and one that failed to somebody else."""

import dataclasses
import io
import shutil
import sys
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import extraction_without_ray
import pytest
import ray
from PIL import Image

from codec_dist.cli import main
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config, save_config
from codec_dist.extraction.calibration import settle
from codec_dist.extraction.coordinator import Coordinator
from codec_dist.extraction.plan import make_plan
from codec_dist.extraction.summary import Account
from codec_dist.extraction.worker import Receipt
from codec_dist.shards import digits, pack
from codec_dist.store import ContributionStore, Ledger, finish_store

MakeConfig = Callable[..., Config]
pytestmark = pytest.mark.ray


class Recorded(Coordinator):
    """Hands out nothing before its first actors are all there, and writes down what it does.

    Without that wait, the first to be there may do everything before there is another.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.most_in_flight = 0
        self.failures: list[tuple[int, int]] = []
        """Shard and actor of each failed attempt."""
        self.beside_a_suspect: list[int] = []
        """Shards given to an actor that has one, if either may have been the end of another actor."""
        self._together = False
        self._calls: dict[int, list[ray.ObjectRef]] = {}

    def _hand_out(self) -> None:
        started = [actor for actor in self._actors if actor.starting is None]
        self._together = self._together or len(started) == self._cluster.actors
        if self._together:
            super()._hand_out()

    def _give_next(self, actor: Any) -> None:
        super()._give_next(actor)
        if any(pending.suspect for pending in actor.in_flight.values()):
            self.beside_a_suspect += [pending.number for pending in list(actor.in_flight.values())[1:]]
        # Asked of Ray: all calls that this actor ever got and that have not ended.
        calls = self._calls.setdefault(actor.serial, [])
        calls += [reference for reference in actor.in_flight if reference not in calls]
        if calls:
            _, unfinished = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
            self.most_in_flight = max(self.most_in_flight, len(unfinished))

    def _count_failure(self, pending: Any, actor: Any, reason: str) -> None:
        self.failures.append((pending.number, actor.serial))
        super()._count_failure(pending, actor, reason)


class Receipts(Account):
    """Keeps what it is told."""

    def __init__(self, shards: Any, when_failed: Callable[[], object] = lambda: None) -> None:
        super().__init__(0.0, shards, {}, None)
        self.actors: dict[int, int] = {}
        """Number of each finished shard → actor that did it."""
        self._when_failed = when_failed

    def enter(self, receipt: Receipt) -> None:
        super().enter(receipt)
        self.actors[receipt.number] = receipt.actor

    def attempt_failed(self) -> None:
        super().attempt_failed()
        self._when_failed()


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
def test_failed_shard_is_done_by_another_actor(
    ray_cluster: Session, make_config_in: MakeConfig, make_config: MakeConfig, shards: Path, tmp_path: Path
) -> None:
    tar = shards / "digits-000001.tar"
    expected = extraction_without_ray.extract_here(make_config_in(tmp_path / "quiet", data={"shards": str(shards)}))
    plan, infos = make_plan(make_config(data={"shards": str(shards)}, cluster={"actors": 2, "attempts": 2}))
    plan, device = settle(plan, infos)
    whole = _break(tar)
    receipts = Receipts(infos, when_failed=lambda: tar.write_bytes(whole))
    coordinator = Recorded(plan, infos, receipts, device)
    assert coordinator.run(range(6)) == []
    ((number, failed_on),) = coordinator.failures
    assert number == 1
    assert receipts.actors.keys() == set(range(6))
    assert {failed_on, receipts.actors[1]} == {0, 1}
    assert coordinator.most_in_flight == 2
    finish_store(plan.store)
    assert ContributionStore(plan.store).digest() == expected


@pytest.mark.slow
def test_shard_that_always_fails_is_given_up_and_named_when_the_others_are_done(
    ray_cluster: Session,
    make_config: MakeConfig,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinators: list[Recorded] = []

    def make(*arguments: Any, **named: Any) -> Recorded:
        coordinators.append(Recorded(*arguments, **named))
        return coordinators[-1]

    monkeypatch.setattr(sys.modules["codec_dist.extraction.extract"], "Coordinator", make)
    tar = shards / "digits-000001.tar"
    whole = _break(tar)
    config = make_config(data={"shards": str(shards)}, cluster={"actors": 2, "attempts": 3})
    save_config(config, tmp_path / "config.yaml")
    command = ["extract", str(tmp_path / "config.yaml")]
    assert main(command) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 6 shards could not be done: digits-000001.tar: " in error
    (coordinator,) = coordinators
    assert [number for number, _ in coordinator.failures] == [1, 1, 1]
    assert {actor for _, actor in coordinator.failures[:2]} == {0, 1}
    assert coordinator.most_in_flight == 2
    ledger = Ledger(f"{config.run.directory}/store")
    assert ledger.done().keys() == {0, 2, 3, 4, 5}

    tar.write_bytes(whole)
    monkeypatch.undo()
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
    plan, device = settle(plan, infos)
    (deadly,) = (number for number, info in enumerate(infos) if f"{few[0].key}.png" in _members(folder / info.name))
    first, *others = {0, 1, 2, 3} - {deadly}
    receipts = Receipts(infos)
    coordinator = Recorded(plan, infos, receipts, device)
    (failed,) = coordinator.run([first, deadly, *others])
    assert failed.name == infos[deadly].name
    assert failed.reason.startswith("its actor was lost: it crashed: ")
    assert "SIGSEGV" in failed.reason
    assert receipts.actors.keys() == {first, *others}
    assert [number for number, _ in coordinator.failures] == [deadly, deadly]
    # The first actor that died had another shard, too: neither counted as failed, and each was then given alone.
    assert receipts.summary(1, 1.0).causes == {"crashed": 3}
    assert not list(Path(config.run.directory).glob("*.crash"))
    assert coordinator.beside_a_suspect == []
    assert coordinator.most_in_flight == 2


def _members(tar: Path) -> list[str]:
    with tarfile.open(tar) as opened:
        return opened.getnames()
