"""Ray as it is: a session on this machine or on a cluster, actor slots, folds over tasks, and job submission."""

from codec_dist.cluster_runtime.errors import ClusterError
from codec_dist.cluster_runtime.fold import Mergeable, map_fold
from codec_dist.cluster_runtime.jobs import JobOutcome, submit_command, submit_job
from codec_dist.cluster_runtime.session import Session, ray_session
from codec_dist.cluster_runtime.slots import ActorSlots, actor_slots, cluster_device, worker_environment

__all__ = [
    "ActorSlots",
    "ClusterError",
    "JobOutcome",
    "Mergeable",
    "Session",
    "actor_slots",
    "cluster_device",
    "map_fold",
    "ray_session",
    "submit_command",
    "submit_job",
    "worker_environment",
]
