"""How many actors a cluster has room for, and what each may use."""

from collections.abc import Mapping
from dataclasses import dataclass

import ray

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.config import ClusterSection


@dataclass(frozen=True)
class ActorSlots:
    """``count`` actors, each with ``num_gpus`` GPUs (0 or 1) and ``num_cpus`` CPUs."""

    count: int
    num_gpus: int
    num_cpus: int


def cluster_device() -> str:
    """``cuda`` if a node of the running cluster has a GPU now, else ``cpu``.

    Raises:
        ClusterError: Ray is not initialised.
    """
    return "cuda" if any(node.get("GPU", 0) >= 1 for node in _nodes()) else "cpu"


def actor_slots(cluster: ClusterSection, device: str | None = None, *, wait: bool = False) -> ActorSlots:
    """One actor per GPU of the running cluster (device ``cuda``), or per ``cpus_per_actor`` CPUs (``cpu``).

    ``cluster.actors`` replaces the number; actors beyond the room wait until nodes join. Call it again
    to see nodes that joined since.

    Args:
        cluster: what an actor needs.
        device: ``cuda`` or ``cpu``; default: :func:`cluster_device`.
        wait: no room now is no error; one actor at least then waits for it.

    Raises:
        ClusterError: Ray is not initialised, or no node has room for one actor.
    """
    on_gpu = (device or cluster_device()) == "cuda"
    nodes = [node for node in _nodes() if not on_gpu or node.get("GPU", 0) >= 1]
    room = 0
    for node in nodes:
        room += room_of(node, cluster, "cuda" if on_gpu else "cpu")
    if not room and not wait:
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ClusterError(
            f"cluster.cpus_per_actor is {cluster.cpus_per_actor}, but the largest node{' with a GPU' * on_gpu} has "
            f"{largest} CPUs: lower it"
        )
    return ActorSlots(cluster.actors or max(room, 1), int(on_gpu), cluster.cpus_per_actor)


def room_of(resources: Mapping[str, float], cluster: ClusterSection, device: str) -> int:
    """How many actors on ``cuda`` or ``cpu`` a node with these resources has room for."""
    by_cpus = int(resources.get("CPU", 0)) // cluster.cpus_per_actor
    return min(by_cpus, int(resources.get("GPU", 0))) if device == "cuda" else by_cpus


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    if not ray.is_initialized():
        raise ClusterError("no Ray session is open: call this inside `with ray_session(...)`")
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_environment(num_cpus: float, num_gpus: float) -> dict[str, str]:
    """Environment variables that hold a worker to its share of a machine.

    Threads (and the arenas of memory) are fixed before any numerical library starts, so results do not depend on
    the machine; a worker without a GPU does not see those of others (Ray shows it all of them).
    """
    threads = str(max(1, int(num_cpus)))
    values = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    # Workers compute in more than one thread, one after the other. With an arena for each of them glibc would keep the
    # memory that each has freed apart: two to three times as much as one of them uses (benchmarks.memory).
    values["MALLOC_ARENA_MAX"] = "1"
    return values if num_gpus else values | {"CUDA_VISIBLE_DEVICES": ""}
