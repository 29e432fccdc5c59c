"""Sessions: closed to the outside, bounded in waiting, and gone when they end."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from codec_dist.cluster_runtime import ActorSlots, ClusterError, Session, actor_slots, ray_session
from codec_dist.cluster_runtime.session import check_ray_answers
from codec_dist.config import ClusterSection


def _listening(pids: set[int]) -> list[tuple[str, int]]:
    """Addresses on which processes listen, from /proc: (hexadecimal address, port)."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue  # ended meanwhile
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.append((address, int(port, 16)))
    return found


def _descendants(root: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are read from Linux's /proc")
def test_local_ray_listens_on_loopback_only(ray_cluster: Session) -> None:
    sockets = _listening(_descendants(os.getpid()))
    assert int(ray_cluster.address.rpartition(":")[2]) in {port for _, port in sockets}
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert {address for address, _ in sockets} <= loopback


@pytest.mark.ray
def test_initialised_ray_is_reused_and_left_running(ray_cluster: Session) -> None:
    with ray_session(ClusterSection()) as session:
        assert session.address == ray_cluster.address
    assert ray.is_initialized()


@pytest.mark.ray
def test_cpu_slots_follow_the_cpus_per_actor(ray_cluster: Session) -> None:
    assert actor_slots(ClusterSection()) == ActorSlots(count=4, num_gpus=0, num_cpus=1)
    assert actor_slots(ClusterSection(cpus_per_actor=3)) == ActorSlots(count=1, num_gpus=0, num_cpus=3)
    assert actor_slots(ClusterSection(actors=2)) == ActorSlots(count=2, num_gpus=0, num_cpus=1)
    with pytest.raises(ClusterError, match="largest node has 4 CPUs"):
        actor_slots(ClusterSection(cpus_per_actor=5))


@pytest.mark.ray
def test_cluster_that_runs_passes_the_check(ray_cluster: Session) -> None:
    check_ray_answers(ray_cluster.address)


@pytest.mark.ray
def test_port_of_the_dashboard_is_refused_as_the_clusters(ray_cluster: Session) -> None:
    assert ray_cluster.dashboard is not None
    with pytest.raises(ClusterError, match="not that of its dashboard"):
        check_ray_answers(ray_cluster.dashboard.removeprefix("http://"))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_address_that_never_answers_is_a_bounded_clear_error(silent_port: int) -> None:
    with pytest.raises(ClusterError, match="not as a Ray cluster"):
        check_ray_answers(f"127.0.0.1:{silent_port}", seconds=0.5)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "expected `auto` or HOST:PORT"),
        ("somewhere", "expected `auto` or HOST:PORT"),
        ("127.0.0.1:99999", "expected `auto` or HOST:PORT"),
    ],
)
def test_bad_address_is_a_clear_error(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        check_ray_answers(address)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "anyscale://cluster", "127.0.0.1:1"])
def test_an_address_of_the_environment_that_cannot_be_joined_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match="RAY_ADDRESS"), ray_session(ClusterSection()):
        pass


def test_slots_without_a_session_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may hold the shared cluster open, so the question is asked where there is none.
    code = (
        "from codec_dist.cluster_runtime import actor_slots; from codec_dist.config import ClusterSection\n"
        "actor_slots(ClusterSection())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ClusterError: no Ray session is open" in result.stderr


SESSION = """
import os, signal, sys, threading
from codec_dist.cluster_runtime import ray_session
from codec_dist.config import ClusterSection
handler = signal.getsignal(signal.SIGTERM)
try:
    with ray_session(ClusterSection()) as session:
        import ray
        print(ray.cluster_resources()["CPU"] >= 1, session.dashboard, flush=True)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(ray.is_initialized(), signal.getsignal(signal.SIGTERM) == handler, "RAY_AUTH_TOKEN" in os.environ)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_interrupted_session_leaves_nothing_behind(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "t"
    home.mkdir()
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "RAY_ADDRESS": "http://127.0.0.1:1"}
    result = subprocess.run(
        [sys.executable, "-c", SESSION], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines() == ["True None", "False True False"], result.stderr
    assert not list(home.iterdir())
    assert not list(temporary.iterdir())


@pytest.mark.ray
def test_threads_other_than_the_main_one_may_open_sessions(ray_cluster: Session) -> None:
    opened: list[str] = []

    def open_session() -> None:
        with ray_session(ClusterSection()) as session:
            opened.append(session.address)

    thread = threading.Thread(target=open_session)
    thread.start()
    thread.join()
    assert opened == [ray_cluster.address]
