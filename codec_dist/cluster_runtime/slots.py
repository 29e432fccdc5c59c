"""How many actors a cluster has room for, and what each may use."""

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


def actor_slots(cluster: ClusterSection) -> ActorSlots:
    """One actor per GPU of the running cluster, or per ``cpus_per_actor`` CPUs where it has no GPU.

    ``cluster.actors`` replaces the number; actors beyond the room wait until nodes join. Call it again
    to see nodes that joined since.

    Raises:
        ClusterError: Ray is not initialised, or no node has room for one actor.
    """
    if not ray.is_initialized():
        raise ClusterError("no Ray session is open: call this inside `with ray_session(...)`")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    room = 0
    for node in nodes:
        by_cpus = int(node.get("CPU", 0)) // cluster.cpus_per_actor
        room += min(by_cpus, int(node.get("GPU", 0))) if with_gpus else by_cpus
    if not room:
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ClusterError(
            f"cluster.cpus_per_actor is {cluster.cpus_per_actor}, but the largest node has {largest} CPUs: lower it"
        )
    return ActorSlots(cluster.actors or room, int(with_gpus), cluster.cpus_per_actor)


def worker_environment(num_cpus: float, num_gpus: float) -> dict[str, str]:
    """Environment variables that hold a worker to its share of a machine.

    Threads are fixed before any numerical library starts, so results do not depend on the machine; a
    worker without a GPU does not see those of others (Ray shows it all of them).
    """
    threads = str(max(1, int(num_cpus)))
    values = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    return values if num_gpus else values | {"CUDA_VISIBLE_DEVICES": ""}
