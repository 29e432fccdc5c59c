"""Ray as it is: a session on this machine or on a cluster, actor slots, folds over tasks, and job submission."""

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.cluster_runtime.jobs import JobOutcome, submit_command, submit_job
from codec_dist.cluster_runtime.losses import (
    MEMORY,
    NODE,
    UNREACHABLE,
    KernelKills,
    Loss,
    current_node,
    explain_loss,
    node_is_alive,
    record_crashes,
)
from codec_dist.cluster_runtime.map_fold import Mergeable, map_fold
from codec_dist.cluster_runtime.node_memory import MemoryShare, memory_shares
from codec_dist.cluster_runtime.session import Session, ray_session
from codec_dist.cluster_runtime.slots import ActorSlots, actor_slots, cluster_device, worker_environment

__all__ = [
    "MEMORY",
    "NODE",
    "UNREACHABLE",
    "ActorSlots",
    "ClusterError",
    "KernelKills",
    "JobOutcome",
    "Loss",
    "MemoryShare",
    "Mergeable",
    "Session",
    "actor_slots",
    "cluster_device",
    "current_node",
    "explain_loss",
    "map_fold",
    "memory_shares",
    "node_is_alive",
    "ray_session",
    "record_crashes",
    "submit_command",
    "submit_job",
    "worker_environment",
]
