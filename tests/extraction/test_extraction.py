"""Extraction on Ray: the same store whatever the number of actors, crashes and resumes; every problem is named."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from extraction_without_ray import extract_planned
from PIL import Image

from codec_dist.attribution import Attributor, IntegratedGradients, Optimizations, TopK
from codec_dist.cluster_runtime import Session
from codec_dist.config import Config, save_config
from codec_dist.extraction import ExtractionError, extract
from codec_dist.extraction.calibration import calibrate
from codec_dist.extraction.coordinator import Coordinator
from codec_dist.extraction.plan import make_plan, open_store
from codec_dist.extraction.summary import Account
from codec_dist.extraction.worker import Receipt
from codec_dist.models import load_model
from codec_dist.shards import load_index, read_shard
from codec_dist.store import ContributionStore, Ledger, finish_store
from codec_dist.tracking import Tracker, read_metrics

MakeConfig = Callable[..., Config]
pytestmark = pytest.mark.ray


def _store(config: Config) -> ContributionStore:
    return ContributionStore(Path(config.run.directory) / "store")


def _digest(config: Config) -> str:
    store = _store(config)
    assert store.complete
    return store.digest()


def _worker_pids() -> set[int]:
    """Extraction actors of this session's own Ray, whose processes descend from this one; Ray names them."""
    names: dict[int, str] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
    found = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid for pid in found if names.get(pid, "").startswith("ray::ShardWorker")}


class ActsAtShard(Tracker):
    """A tracker that does something after some shard has ended."""

    def __init__(self, config: Config, shard: int, act: Callable[[], None]) -> None:
        super().__init__(Path(config.run.directory), config.tracking, stage="extract", group="test", config={})
        self._shard, self._act = shard, act

    def log(self, metrics: Mapping[str, float], *, step: int | None = None, axis: str = "step") -> None:
        super().log(metrics, step=step, axis=axis)
        if step == self._shard:
            self._act()


@pytest.fixture(scope="session")
def reference(
    make_config_in: MakeConfig, ray_cluster: Session, tmp_path_factory: pytest.TempPathFactory
) -> ContributionStore:
    """The store of an undisturbed run with one actor."""
    config = make_config_in(tmp_path_factory.mktemp("reference"))
    summary = extract(config)
    assert (summary.shards_done, summary.shards_skipped, summary.samples) == (6, 0, 120)
    return _store(config)


def test_store_holds_what_the_engine_computes(reference: ContributionStore, make_config: MakeConfig) -> None:
    config, store = make_config(), reference
    loaded = load_model(config.model, seed=config.run.seed)
    attributor = Attributor(
        loaded.module,
        ["blocks.3", "blocks.5"],
        IntegratedGradients(steps=2, points="uniform"),
        TopK(),
        activations=True,
    )
    index = load_index(config.data.shards)
    decoded = list(read_shard(index.location, index.shards[2]))
    images = torch.stack([loaded.preprocessing(sample.image) for sample in decoded if sample.image is not None])
    expected = attributor(images)
    rows = store.samples.slice(40, 20)
    assert rows["shard"].unique().to_pylist() == ["digits-000002.tar"]
    assert rows["key"].to_pylist() == [sample.key for sample in decoded]
    assert rows["label"].to_pylist() == [sample.label for sample in decoded]
    assert rows["prediction"].to_pylist() == expected.prediction.tolist()
    for layer, result in expected.items():
        for quantity, values in result.quantities().items():
            # Other batch sizes than the store's, so equal up to rounding.
            found = store.read(layer, quantity, np.arange(40, 60))
            np.testing.assert_allclose(found, values.numpy(), rtol=1e-4, atol=1e-6)
        assert result.completeness is not None
        np.testing.assert_allclose(rows[f"completeness.{layer}"], result.completeness.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("actors", "order", "reading", "form"),
    [
        (2, [5, 1, 3, 0, 4, 2], {"decode_threads": 2, "prefetch": 1}, {"compression": "lz4", "sharding": 7}),
        pytest.param(4, [2, 3, 0, 5, 4, 1], {"prefetch": 7}, {}, marks=pytest.mark.slow),
    ],
)
def test_neither_actors_nor_order_nor_prefetch_nor_form_of_the_store_change_the_digest(
    actors: int,
    order: list[int],
    reading: dict[str, Any],
    form: dict[str, Any],
    ray_cluster: Session,
    make_config: MakeConfig,
    reference: ContributionStore,
) -> None:
    config = make_config(cluster={"actors": actors}, data=reading, store=form)
    plan, shards = make_plan(config)
    assert calibrate(plan, shards) == (plan, "cpu")
    serials: set[int] = set()

    class Waits(Account):
        def enter(self, receipt: Receipt) -> None:
            super().enter(receipt)
            serials.add(receipt.actor)
            # The first to start does not run away with all shards before the others are there.
            ray.get([each.loading for each in coordinator._handles.values() if each.loading is not None])

    coordinator = Coordinator(plan, shards, Waits(0.0, shards, {}, None), "cpu")
    assert coordinator.run(order) == []
    # A quick actor may do the work of one that is late.
    assert len(serials) > 1
    finish_store(plan.store)
    assert _digest(config) == reference.digest()
    assert list(Path(plan.store).rglob("c.5.0"))
    assert not list(Path(plan.store).rglob("c.6.0"))


def test_killed_actor_leaves_store_identical(
    ray_cluster: Session, make_config: MakeConfig, reference: ContributionStore
) -> None:
    config = make_config(cluster={"actors": 1})
    killed: set[int] = set()

    def kill() -> None:
        killed.update(_worker_pids())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    with ActsAtShard(config, 2, kill) as tracker:
        summary = extract(config, tracker)
    assert killed
    assert summary.shards_done == 6
    assert _digest(config) == reference.digest()


def test_interrupted_run_resumes_and_leaves_finished_shards_alone(
    ray_cluster: Session, make_config: MakeConfig, reference: ContributionStore
) -> None:
    config = make_config()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ActsAtShard(config, 3, interrupt) as tracker:
        extract(config, tracker)
    ledger = _store(config).path / "ledger"
    before = {path.name: path.stat().st_mtime_ns for path in ledger.glob("[0-9]*.json")}
    assert 3 <= len(before) < 6
    summary = extract(config)
    assert (summary.shards_done, summary.shards_skipped) == (6 - len(before), len(before))
    assert _digest(config) == reference.digest()
    # Finished shards were left alone, and a finished store is left alone altogether.
    after = {path.name: path.stat().st_mtime_ns for path in ledger.glob("[0-9]*.json")}
    assert before.items() <= after.items()
    nothing = extract(config)
    assert (nothing.shards_done, nothing.shards_skipped, nothing.images_per_second) == (0, 6, 0.0)
    assert after == {path.name: path.stat().st_mtime_ns for path in ledger.glob("[0-9]*.json")}


def _shards_with_bad_samples(folder: Path) -> Path:
    """Two tars of ten images; in the second one is torn, one is no image, and one has a label beyond the outputs."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"some-{shard:06d}.tar", "w") as tar:
            for number in range(10):
                buffer = io.BytesIO()
                Image.new("L", (8, 8), 20 * number).save(buffer, "PNG")
                content = buffer.getvalue()
                if shard == 1 and number == 4:
                    content = content[:30]
                if shard == 1 and number == 7:
                    content = b"not an image"
                label = 10 if shard == 1 and number == 2 else number
                for extension, data in (("png", content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"sample-{shard}-{number}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def test_bad_samples_are_dropped_named_and_limited(
    ray_cluster: Session, make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = str(_shards_with_bad_samples(tmp_path / "shards"))
    config = make_config(data={"shards": shards, "limit": 19, "max_bad_fraction": 0.16})
    with Tracker(Path(config.run.directory), config.tracking, stage="extract", group="test", config={}) as tracker:
        summary = extract(config, tracker)
    assert (summary.samples, summary.dropped) == (16, 3)
    marker = Ledger(_store(config).path).done()[1]
    assert [key for key, _ in marker.dropped] == ["sample-1-2", "sample-1-4", "sample-1-7"]
    assert marker.dropped[0][1] == "the label 10 is out of range: there are classes 0 to 9"
    assert all("cannot be decoded" in reason for _, reason in marker.dropped[1:])
    keys = _store(config).samples["key"].to_pylist()
    assert len(keys) == 16
    assert not {"sample-1-2", "sample-1-4", "sample-1-7", "sample-1-9"} & set(keys)
    logged = [entry for entry in read_metrics(Path(config.run.directory) / "metrics.jsonl") if "summary" in entry]
    assert logged[-1]["summary"]["extract/dropped"] == 3

    strict = make_config(data={"shards": shards, "limit": 19, "max_bad_fraction": 0.15})
    message = r"3 of 19 samples cannot be used, more than data\.max_bad_fraction \(0\.15\) .*sample-1-2 in some-000001"
    with pytest.raises(ExtractionError, match=message):
        extract(strict)


@pytest.mark.slow
def test_shard_that_hangs_is_timed_out_and_named(ray_cluster: Session, make_config: MakeConfig) -> None:
    config = make_config(cluster={"actors": 1, "attempts": 1, "shard_timeout_seconds": 15})
    stopped: set[int] = set()

    def stop() -> None:
        stopped.update(_worker_pids())
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    try:
        with (
            ActsAtShard(config, 2, stop) as tracker,
            pytest.raises(ExtractionError, match=r"1 of 6 .*\.tar: it took longer than .*shard_timeout_seconds"),
        ):
            extract(config, tracker)
    finally:
        for pid in stopped & _worker_pids():
            os.kill(pid, signal.SIGKILL)
    assert len(Ledger(_store(config).path).done()) == 5


def test_model_that_never_loads_is_timed_out(ray_cluster: Session, make_config: MakeConfig) -> None:
    # No model loads in a microsecond.
    config = make_config(data={"limit": 20}, cluster={"actors": 1, "attempts": 1, "shard_timeout_seconds": 1e-6})
    with pytest.raises(ExtractionError, match=r"no actor can start: loading the model took .*shard_timeout_seconds"):
        extract(config)


def test_what_the_self_check_found_is_stored_and_used_by_whoever_goes_on(
    ray_cluster: Session, make_config: MakeConfig, reference: ContributionStore
) -> None:
    assert reference.settings["optimizations"] == asdict(Optimizations())
    config = make_config(attribution={"layers": ["blocks.3"]})
    plain = Optimizations(fold_batchnorm=False, channels_last=False)
    plan, shards = make_plan(config)
    open_store(plan, shards, {"device": "cpu", "optimizations": asdict(plain)})
    plan, _ = calibrate(plan, shards)
    extract_planned(plan, shards, range(len(shards)))
    loaded = load_model(config.model, seed=config.run.seed)
    index = load_index(config.data.shards)
    images = torch.stack([loaded.preprocessing(sample.image) for sample in read_shard(index.location, index.shards[0])])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {
            each: Attributor(
                loaded.module,
                ["blocks.3"],
                IntegratedGradients(2, points="uniform"),
                TopK(1),
                microbatch=8,
                optimizations=each,
            )(images)["blocks.3"].positive.numpy()
            for each in (plain, Optimizations())
        }
    finally:
        torch.set_num_threads(threads)
    found = _store(config).read("blocks.3", "contribution-positive")[: len(images)]
    assert np.array_equal(found, rows[plain])
    assert not np.array_equal(found, rows[Optimizations()])


def test_store_of_gpus_is_not_continued_on_cpus(ray_cluster: Session, make_config: MakeConfig) -> None:
    config = make_config()
    open_store(*make_plan(config), {"device": "cuda"})
    with pytest.raises(ExtractionError, match=r"begun on GPUs.* no node has a GPU now"):
        extract(config)


# Extracts until the second shard has ended, says so, and then waits for ever.
DRIVER = """
import sys
from codec_dist.config import load_config
from codec_dist.extraction import extract
from codec_dist.tracking import Tracker

class Waits(Tracker):
    def log(self, metrics, *, step=None, axis="step"):
        if step == 2:
            print("two shards", flush=True)
            sys.stdin.read()

config = load_config(sys.argv[1])
with Waits(config.run.directory, config.tracking, stage="extract", group="test", config={}) as tracker:
    extract(config, tracker)
"""


@pytest.mark.slow
def test_killed_driver_resumes_to_the_same_digest(
    ray_cluster: Session, make_config: MakeConfig, reference: ContributionStore, tmp_path: Path
) -> None:
    config = make_config(cluster={"actors": 1, "address": ray_cluster.address})
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "two shards\n"
        driver.kill()
    summary = extract(make_config())
    # The actor may have ended the shards that it held while its driver was dying.
    assert 2 <= summary.shards_skipped <= 4
    assert summary.shards_done == 6 - summary.shards_skipped
    assert _digest(config) == reference.digest()
