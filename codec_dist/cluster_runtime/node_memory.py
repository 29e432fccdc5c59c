"""How much memory the actors of a running cluster may use: on each node, and on each GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from codec_dist.cluster_runtime.slots import room_of
from codec_dist.config import ClusterSection
from codec_dist.utils import available_memory

# Of what a node has free. Ray's memory monitor kills workers when 95 % of a node's memory is used; the rest is for
# Ray's own processes, its object store (which is hardly used here), the driver and the cache of files.
USABLE_OF_HOST = 0.8
USABLE_OF_DEVICE = 0.9
SECONDS_TO_MEASURE = 60.0


@dataclass(frozen=True)
class MemoryShare:
    """What one actor on a node may use at most, so that all that may run there fit."""

    node: str
    """The node's address."""
    actors: int
    """Actors that may run there at once."""
    host_bytes: int
    device_bytes: int | None = None
    """Of its GPU; None on CPUs, and where no GPU could be looked at."""


@dataclass(frozen=True)
class _Found:
    """What one machine tells."""

    host_bytes: int
    device_bytes: int | None


def memory_shares(cluster: ClusterSection, device: str) -> list[MemoryShare]:
    """The shares of actors on every machine of the running cluster that has room for any, smallest host share first.

    The memory of a machine is what Ray counts as its nodes' (which heeds ``ray start --memory`` and a container's
    limit) and what the machine and the control groups of a process there leave now, whichever is less. Nodes of one
    address share one machine.

    Args:
        cluster: what an actor takes, and how many there are.
        device: ``cuda`` or ``cpu``.
    """
    machines: dict[str, list[dict[str, Any]]] = {}
    for node in ray.nodes():
        if node["Alive"] and room_of(node["Resources"], cluster, device):
            machines.setdefault(node["NodeManagerAddress"], []).append(node)
    found = _look_at({address: nodes[0] for address, nodes in machines.items()}, device)
    shares = [_share(address, nodes, found.get(address), cluster, device) for address, nodes in machines.items()]
    return sorted(shares, key=lambda share: share.host_bytes)


def _share(
    address: str, nodes: Sequence[dict[str, Any]], found: _Found | None, cluster: ClusterSection, device: str
) -> MemoryShare:
    rooms = [room_of(node["Resources"], cluster, device) for node in nodes]
    # Any machine may get all actors that there are to be.
    actors = min(sum(rooms), cluster.actors or sum(rooms))
    counted = [
        sum(int(node["Resources"].get(name, 0)) for name in ("memory", "object_store_memory")) // min(room, actors)
        for node, room in zip(nodes, rooms, strict=True)
    ]
    host = min(each for each in [*counted, *([found.host_bytes // actors] if found else [])])
    on_device = found.device_bytes if found and device == "cuda" else None
    return MemoryShare(
        node=address,
        actors=actors,
        host_bytes=int(USABLE_OF_HOST * host),
        device_bytes=None if on_device is None else int(USABLE_OF_DEVICE * on_device),
    )


def _look_at(nodes: dict[str, dict[str, Any]], device: str) -> dict[str, _Found]:
    """What the machines tell, by address; those that do not answer in time are left out."""
    own = ray.get_runtime_context().get_node_id()
    found: dict[str, _Found] = {}
    waiting: dict[Any, str] = {}
    for address, node in nodes.items():
        if device == "cpu" and node["NodeID"] == own:
            found[address] = _measure(on_gpu=False)
            continue
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(_measure).options(
            num_cpus=0, num_gpus=int(device == "cuda"), max_retries=0, scheduling_strategy=strategy
        )
        waiting[task.remote(on_gpu=device == "cuda")] = address
    if waiting:
        ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=SECONDS_TO_MEASURE)
        found |= dict(_answers({reference: waiting[reference] for reference in ready}))
        for reference in late:
            ray.cancel(reference, force=True)
    return found


def _answers(references: dict[Any, str]) -> Iterator[tuple[str, _Found]]:
    for reference, address in references.items():
        try:
            yield address, ray.get(reference)
        except ray.exceptions.RayError:
            continue  # a node that died meanwhile, or a GPU that torch cannot use: its actor will say so


def _measure(on_gpu: bool) -> _Found:
    """In a process of the machine."""
    if not on_gpu:
        return _Found(available_memory(), None)
    import torch

    return _Found(available_memory(), torch.cuda.mem_get_info()[0])
