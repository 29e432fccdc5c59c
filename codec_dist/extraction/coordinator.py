"""The coordinator: Ray actors that do what the scheduling of shards decides, and whose losses it outlives."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from codec_dist.cluster_runtime import (
    MEMORY,
    NODE,
    UNREACHABLE,
    ActorSlots,
    KernelKills,
    Loss,
    actor_slots,
    current_node,
    explain_loss,
    node_is_alive,
    worker_environment,
)
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan
from codec_dist.extraction.scheduling import IN_FLIGHT, FailedShard, ShardScheduler, ShardTimeouts
from codec_dist.extraction.worker import Failure, Receipt, ShardTask, ShardWorker, crash_file
from codec_dist.shards import ShardInfo

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_COUNTS = 10.0
SECONDS_BETWEEN_NOTICES = 60.0

# Causes of lost actors beside those of :func:`explain_loss`.
HUNG, BROKEN, NOT_STARTED = "hung", "unfit after an error", "could not start"


class Listener(Protocol):
    """Called with what happens, as it happens."""

    def enter(self, receipt: Receipt) -> None:
        """A shard is finished."""

    def attempt_failed(self) -> None:
        """An attempt at a shard has failed."""

    def actor_lost(self, cause: str) -> None:
        """An actor has died, hung or broken, and is replaced if there is work; ``cause`` in a few words."""


@dataclass
class _Handle:
    """Ray's side of an actor."""

    handle: Any
    loading: "ray.ObjectRef | None"
    """Ends when the model is loaded; None from then on."""
    placing: "ray.ObjectRef | None"
    """Ends when the actor has its place and runs; None from then on."""
    node: str | None = None
    """Ray's name of its node, once it runs."""
    calls: "dict[ray.ObjectRef, int]" = field(default_factory=dict)
    """Shards that it was given, by the call that does them."""


class Coordinator:
    """Carries out what a :class:`ShardScheduler` decides, with Ray actors; a Ray session must be open.

    Args:
        plan: what every actor needs to know.
        shards: the shards by number.
        listener: called with each finished shard, in the order in which they end, and of failures.
        device: ``cuda`` or ``cpu``, of every actor.
        check: called every second or so; raises what must end the run.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[ShardInfo],
        listener: Listener,
        device: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._plan, self._shards, self._listener, self._check = plan, shards, listener, check
        self._device = device
        self._cluster = plan.config.cluster
        self._kills = KernelKills()
        # Nodes of lost actors that could not be reached: whether these are gone is known some seconds later.
        self._unreachable: list[str] = []
        self._handles: dict[int, _Handle] = {}
        self._slots = ActorSlots(0, 0, 1)
        self._next_count = self._next_notice = 0.0

    def run(self, pending: Sequence[int]) -> list[FailedShard]:
        """Do the shards of these numbers; returns those that could not be done.

        All actors are ended when this returns or raises, also by an interrupt.

        Raises:
            ClusterError: the cluster has no room for an actor.
            ExtractionError: no actor can start, or the disk is full.
        """
        self._scheduler = ShardScheduler(
            [shard.name for shard in self._shards],
            [shard.samples for shard in self._shards],
            pending,
            attempts=self._cluster.attempts,
            timeouts=ShardTimeouts(self._cluster.shard_timeout_seconds),
        )
        self._next_notice = time.monotonic() + SECONDS_BETWEEN_NOTICES
        try:
            while not self._scheduler.is_done:
                self._check()
                self._start_actors()
                self._hand_out()
                self._end_overdue()
                self._collect()
            self._tell_unreachable(last=True)
            return self._scheduler.failed
        finally:
            for actor in list(self._handles):
                self._kill(actor)

    def _start_actors(self) -> None:
        """Start actors up to the cluster's slots, which may grow."""
        now = time.monotonic()
        if now >= self._next_count:
            self._slots = actor_slots(self._cluster, self._device, wait=self._scheduler.any_loaded)
            self._next_count = now + SECONDS_BETWEEN_COUNTS
            self._kills.forget_old()
            self._tell_unreachable()
        for actor in self._scheduler.start_actors(self._slots.count):
            self._start(actor)

    def _start(self, actor: int) -> None:
        slots = self._slots
        actor_class: Any = ray.remote(ShardWorker).options(
            num_cpus=slots.num_cpus,
            num_gpus=slots.num_gpus,
            max_restarts=0,
            max_concurrency=IN_FLIGHT,
            runtime_env={"env_vars": worker_environment(slots.num_cpus, slots.num_gpus)},
        )
        # What a driver that was killed may have left would be taken for this actor's.
        crash_file(self._plan, actor).unlink(missing_ok=True)
        handle = actor_class.remote(self._plan, bool(slots.num_gpus), actor)
        self._handles[actor] = _Handle(handle, handle.prepare.remote(), handle.greet.remote())

    def _hand_out(self) -> None:
        for assignment in self._scheduler.assignments(time.monotonic()):
            info = self._shards[assignment.shard]
            task = ShardTask(assignment.shard, info, assignment.attempt, assignment.turn)
            actor = self._handles[assignment.actor]
            actor.calls[actor.handle.extract.remote(task)] = assignment.shard

    def _collect(self) -> None:
        """Wait for the next news from any actor, and act on it."""
        owners: dict[ray.ObjectRef, int] = {}
        for number, actor in self._handles.items():
            news = [actor.placing, actor.loading, *actor.calls]
            owners |= {reference: number for reference in news if reference is not None}
        if not owners:
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for reference in ready:
            self._hear(owners[reference], reference)
        self._notice_waiting()

    def _hear(self, number: int, reference: "ray.ObjectRef") -> None:
        actor = self._handles[number]
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            # The actor, its node or its memory is gone; whatever it had is handed out again.
            self._lose(number, error)
            return
        if reference == actor.placing:
            actor.placing, actor.node = None, outcome
            self._scheduler.actor_placed(number, time.monotonic())
        elif reference != actor.loading:
            self._hear_of_shard(number, actor.calls.pop(reference), outcome)
        elif isinstance(outcome, Failure):
            self._scheduler.end_actor(number, outcome.reason)
            self._end(number, NOT_STARTED)
        else:
            actor.loading = None
            self._scheduler.actor_loaded(number)

    def _hear_of_shard(self, actor: int, shard: int, outcome: Receipt | Failure) -> None:
        now = time.monotonic()
        if isinstance(outcome, Receipt):
            self._scheduler.shard_finished(actor, shard, now)
            self._listener.enter(outcome)
            return
        if outcome.full:
            raise ExtractionError(
                f"{outcome.reason}, then run the same command again, {self._shards[shard].name} and the other "
                "shards that are not done will be"
            )
        self._listener.attempt_failed()
        self._scheduler.shard_failed(actor, shard, outcome.reason, now)
        if outcome.broken:
            # Such as a CUDA context that no kernel can use any more.
            self._scheduler.end_actor(actor, outcome.reason)
            self._end(actor, BROKEN)

    def _end_overdue(self) -> None:
        for overdue in self._scheduler.overdue(time.monotonic()):
            automatic = ", automatic" if self._cluster.shard_timeout_seconds == "auto" else ""
            limit = f"cluster.shard_timeout_seconds ({overdue.limit:.0f} s{automatic})"
            loads = overdue.shard is None
            reason = f"loading the model took longer than {limit}" if loads else f"it took longer than {limit}"
            self._scheduler.end_overdue(overdue, reason)
            self._end(overdue.actor, NOT_STARTED if loads else HUNG)
            if not loads:
                self._listener.attempt_failed()

    def _lose(self, number: int, error: Exception) -> None:
        """Find out why an actor was lost, and count it."""
        actor = self._handles[number]
        is_here = actor.node is not None and actor.node == current_node()
        loss = explain_loss(
            error,
            node=actor.node,
            crash_file=crash_file(self._plan, number),
            killed_by_kernel=self._kills.claim if is_here else None,
        )
        if self._scheduler.actor_lost(number, f"its actor was lost: {loss.text}{_remedy(loss)}"):
            self._listener.attempt_failed()
        self._end(number, loss.cause)

    def _end(self, number: int, cause: str) -> None:
        """End an actor that the scheduler no longer counts on, and say why."""
        node = self._handles[number].node
        self._kill(number)
        if cause == UNREACHABLE and node is not None:
            self._unreachable.append(node)
        else:
            self._listener.actor_lost(cause)

    def _kill(self, number: int) -> None:
        ray.kill(self._handles.pop(number).handle)
        crash_file(self._plan, number).unlink(missing_ok=True)

    def _tell_unreachable(self, last: bool = False) -> None:
        """Count lost actors that could not be reached once their nodes are known to be gone, or at the ``last``."""
        for node in list(self._unreachable):
            gone = not node_is_alive(node)
            if gone or last:
                self._unreachable.remove(node)
                self._listener.actor_lost(NODE if gone else UNREACHABLE)

    def _notice_waiting(self) -> None:
        """Say so when nothing happens because the cluster gives no actor its place."""
        now = time.monotonic()
        if not self._scheduler.is_waiting:
            self._next_notice = now + SECONDS_BETWEEN_NOTICES
        elif now >= self._next_notice:
            self._next_notice = now + SECONDS_BETWEEN_NOTICES
            sys.stderr.write(
                f"extract: waiting for the cluster to start an actor ({self._slots.num_cpus} CPUs and "
                f"{self._slots.num_gpus} GPUs each)\n"
            )


def _remedy(loss: Loss) -> str:
    if loss.cause != MEMORY:
        return ""
    return " (lower cluster.actors; for a new store, a lower attribution.microbatch or fewer layers help, too)"
