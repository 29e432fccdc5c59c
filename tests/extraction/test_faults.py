"""Whatever is killed, hangs or fills up on a cluster of several nodes: the store gets the digest of a quiet run.

One cluster of three raylets (a head without CPUs, two nodes of one each) serves all tests. It lives in a process of
its own, as does every driver: the session of the other tests, and the cluster, do not meet.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_disk import small_disk

from codec_dist.config import Config, save_config
from codec_dist.store import ContributionStore, Ledger, verify_store
from codec_dist.tracking import read_metrics

MakeConfig = Callable[..., Config]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A cluster that adds and kills nodes when told to.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
local = {"node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **local})


def add():
    for left in (2, 1, 0):
        try:
            return cluster.add_node(num_cpus=1, **local)
        except Exception:  # Ray gives a node 30 s to start, which a busy machine can exceed
            if not left:
                raise


nodes = [add() for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "add":
        nodes.append(add())
    else:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""

# Extracts, and tells of every shard that has ended; after some of them it waits for a line.
DRIVER = """
import sys
from codec_dist.config import load_config
from codec_dist.extraction import extract
from codec_dist.tracking import Tracker
from codec_dist.utils import CodecError

class Tells(Tracker):
    def log(self, metrics, *, step=None, axis="step"):
        super().log(metrics, step=step, axis=axis)
        print("shard", flush=True)
        if step == int(sys.argv[2]):
            sys.stdin.readline()

config = load_config(sys.argv[1])
with Tells(config.run.directory, config.tracking, stage="extract", group="test", config={}) as tracker:
    try:
        summary = extract(config, tracker)
        print("summary", summary.shards_done, summary.failed, summary.retries, summary.actors_lost, flush=True)
    except CodecError as error:
        print("error", error, flush=True)
"""


@dataclass
class FaultyCluster:
    """A Ray cluster in another process."""

    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]

    def order(self, word: str) -> None:
        """``add`` or ``kill`` a node."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(word, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def actors(self) -> set[int]:
        """Processes of extraction actors on its nodes."""
        return _actors_below(self.process.pid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[FaultyCluster]:
    """Three raylets on this machine, closed to the outside."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
        # Actors find the hungry and the meeting model here.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        # Ray then takes 127.0.0.1 for what it is.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A node that was killed is known to be dead in seconds.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
    }
    command = [sys.executable, "-c", CLUSTER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    for left in (2, 1, 0):
        with (
            tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
            subprocess.Popen(
                command, **pipes, text=True, env=(environment := environment | {"RAY_TMPDIR": folder})
            ) as process,
        ):
            assert process.stdout is not None
            assert process.stdin is not None
            address = process.stdout.readline().strip()
            if not address and left:
                continue
            assert address.startswith("127.0.0.1:"), "Ray does not start: is the machine overloaded?"
            yield FaultyCluster(process, address, environment)
            process.stdin.close()
            process.wait(60)
            return


@pytest.fixture(scope="module")
def make(cluster: FaultyCluster, make_config_in: MakeConfig) -> MakeConfig:
    """Configs of runs on the cluster, whose shards take a second or more each."""

    def config(directory: Path, **sections: dict) -> Config:
        method = {"name": "integrated_gradients", "options": {"steps": 60, "points": "uniform"}}
        own = {"layers": ["blocks.3", "blocks.5"], "method": method, "microbatch": 8}
        section = {"address": cluster.address} | sections.pop("cluster", {})
        return make_config_in(directory, attribution=own, cluster=section, **sections)

    return config


class Driver:
    """A run in a process of its own."""

    def __init__(self, config: Config, environment: dict[str, str], waits_after: int) -> None:
        directory = Path(config.run.directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
        command = [sys.executable, "-c", DRIVER, str(directory / "config.yaml"), str(waits_after)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait_for_shards(self, count: int) -> None:
        """Until so many shards have ended."""
        assert self.process.stdout is not None
        for _ in range(count):
            assert self.process.stdout.readline() == "shard\n"

    def go_on(self) -> None:
        """End the wait after a shard."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def end(self) -> list[str]:
        """The words of its last line."""
        output, _ = self.process.communicate(timeout=400)
        return output.splitlines()[-1].split()


@contextmanager
def _run(config: Config, cluster: FaultyCluster, waits_after: int = -1) -> Iterator[Driver]:
    driver = Driver(config, cluster.environment, waits_after)
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.communicate()


def _finish(config: Config, cluster: FaultyCluster) -> list[str]:
    with _run(config, cluster) as driver:
        return driver.end()


def _actors_below(root: int) -> set[int]:
    names: dict[int, str] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid for pid in found if names.get(pid, "").startswith("ray::ShardWorker")}


def _digest(config: Config) -> str:
    store = Path(config.run.directory) / "store"
    assert verify_store(store).ok
    assert ContributionStore(store).complete
    return ContributionStore(store).digest()


@pytest.fixture(scope="module")
def quiet(make: MakeConfig, cluster: FaultyCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run with one actor."""
    config = make(tmp_path_factory.mktemp("quiet"), cluster={"actors": 1})
    assert _finish(config, cluster) == ["summary", "6", "0", "0", "0"]
    return _digest(config)


def _kill(pids: Sequence[int] | set[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_actor_killed_in_mid_shard(cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path) -> None:
    config = make(tmp_path)
    with _run(config, cluster, waits_after=1) as driver:
        driver.wait_for_shards(1)
        killed = cluster.actors()
        assert killed
        _kill(killed)
        driver.go_on()
        outcome = driver.end()
    assert outcome[:3] == ["summary", "6", "0"]
    assert int(outcome[4]) >= 1
    assert _digest(config) == quiet


def test_all_nodes_are_killed_and_others_join(
    cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path
) -> None:
    config = make(tmp_path)
    with _run(config, cluster, waits_after=1) as driver:
        driver.wait_for_shards(1)
        cluster.order("kill")
        cluster.order("kill")
        driver.go_on()
        # At least two shards are left, and nobody else can do them.
        cluster.order("add")
        cluster.order("add")
        outcome = driver.end()
    assert outcome[:3] == ["summary", "6", "0"]
    assert int(outcome[4]) >= 1
    assert _digest(config) == quiet


def test_a_node_that_joins_is_used(cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path) -> None:
    for pipe in ("first", "second"):
        os.mkfifo(tmp_path / pipe)
    config = make(
        tmp_path,
        model={"spec": "module:meeting_classifier:meeting_classifier", "options": {"folder": str(tmp_path)}},
        cluster={"actors": None, "attempts": 1, "shard_timeout_seconds": 150},
    )
    cluster.order("kill")
    with _run(config, cluster) as driver:
        # The only actor is in its first shard, and stays in it until there is another.
        assert (tmp_path / "first").read_bytes() == b""
        assert len(cluster.actors()) == 1
        cluster.order("add")
        outcome = driver.end()
    assert outcome == ["summary", "6", "0", "0", "0"]
    (actors,) = [entry["table"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "table" in entry]
    shards = [row[actors["columns"].index("shards")] for row in actors["rows"]]
    assert len(shards) == 2
    assert min(shards) >= 1
    assert _digest(config) == quiet


def test_driver_killed_and_started_again(cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path) -> None:
    config = make(tmp_path)
    with _run(config, cluster, waits_after=2) as driver:
        driver.wait_for_shards(2)
        driver.process.kill()
    done = int(_finish(config, cluster)[1])
    # At most the shards in flight (two for each of two actors) were lost with it.
    assert 0 <= done <= 4
    assert _digest(config) == quiet


def test_actor_that_hangs_is_replaced(cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path) -> None:
    config = make(tmp_path, cluster={"actors": 1, "shard_timeout_seconds": 40})
    with _run(config, cluster, waits_after=1) as driver:
        driver.wait_for_shards(1)
        (hung,) = cluster.actors()
        os.kill(hung, signal.SIGSTOP)
        driver.go_on()
        outcome = driver.end()
    assert outcome[:3] == ["summary", "6", "0"]
    assert int(outcome[3]) >= 1
    assert hung not in cluster.actors()
    assert _digest(config) == quiet


def test_actor_out_of_memory_is_replaced(cluster: FaultyCluster, make: MakeConfig, quiet: str, tmp_path: Path) -> None:
    # Where not even a thread can begin, Python may wait for it for ever: then the shard is overdue.
    config = make(
        tmp_path,
        model={"spec": "module:hungry_classifier:hungry_classifier"},
        cluster={"actors": 1, "shard_timeout_seconds": 40},
    )
    with _run(config, cluster, waits_after=1) as driver:
        driver.wait_for_shards(1)
        (starved,) = cluster.actors()
        # It keeps what it has, in which small tensors find room. Half of the model's workspace, which is new with
        # every pass, is less than it has: no pass is possible, even of one image.
        resource.prlimit(starved, resource.RLIMIT_AS, (2**29, 2**29))
        driver.go_on()
        outcome = driver.end()
    assert outcome[:3] == ["summary", "6", "0"]
    assert int(outcome[4]) >= 1
    assert _digest(config) == quiet


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own of 100 MB."""
    with small_disk(tmp_path / "run" / "store", "100m") as folder:
        yield folder


def _fill(path: Path) -> None:
    """A file that takes all the space there is."""
    with path.open("wb", buffering=0) as file:
        # A block that an actor could not write whole is removed, which makes space again.
        while os.statvfs(path.parent).f_bavail:
            with suppress(OSError):
                while True:
                    file.write(bytes(2**12))


def test_full_disk_stops_the_run_until_there_is_space(
    cluster: FaultyCluster, make: MakeConfig, quiet: str, disk: Path
) -> None:
    config = make(disk.parent)
    filler = disk.parent / "store" / "somebody-elses"
    with _run(config, cluster, waits_after=1) as driver:
        driver.wait_for_shards(1)
        _fill(filler)
        driver.go_on()
        outcome = " ".join(driver.end())
    assert outcome.startswith("error cannot write shard digits-00000")
    assert "No space left" in outcome
    assert "run the same command again" in outcome
    assert not {number for number, marker in Ledger(disk).done().items() if not marker.rows}
    filler.unlink()
    # What was being written when the disk was full may be left in parts.
    (disk / "samples" / ".000005.parquet.torn.partial").write_bytes(b"torn")
    assert _finish(config, cluster)[0] == "summary"
    assert not list(disk.rglob("*.partial"))
    assert _digest(config) == quiet
