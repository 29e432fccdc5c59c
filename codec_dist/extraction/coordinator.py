"""The coordinator: hands shards to actors by dynamic pull, and outlives actors, nodes and bad shards."""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from codec_dist.extraction.timeouts import ShardTimeouts
from codec_dist.extraction.worker import Failure, Receipt, ShardTask, ShardWorker, crash_file
from codec_dist.shards import ShardInfo

IN_FLIGHT = 2
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_COUNTS = 10.0
SECONDS_BETWEEN_NOTICES = 60.0

# Causes of lost actors beside those of :func:`explain_loss`.
HUNG, BROKEN, NOT_STARTED = "hung", "unfit after an error", "could not start"


@dataclass(frozen=True)
class FailedShard:
    """A shard that was given up, after all its attempts."""

    name: str
    reason: str


class Listener(Protocol):
    """Is told what happens, as it happens."""

    def enter(self, receipt: Receipt) -> None:
        """A shard is finished."""

    def attempt_failed(self) -> None:
        """An attempt at a shard has failed."""

    def actor_lost(self, cause: str) -> None:
        """An actor has died, hung or broken, and is replaced if there is work; ``cause`` in a few words."""


@dataclass(eq=False)
class _Pending:
    """A shard that waits for an actor."""

    number: int
    attempts: int = 0
    tried_by: set[int] = field(default_factory=set)
    suspect: bool = False
    """An actor was lost while it had this shard and another: it is handed out alone from then on."""


@dataclass
class _Actor:
    """An actor as the coordinator sees it."""

    serial: int
    handle: Any
    starting: "ray.ObjectRef | None"
    """Ends when the model is loaded; None from then on."""
    placing: "ray.ObjectRef | None"
    """Ends when the actor has its place and runs; None from then on."""
    placed_since: float | None = None
    node: str | None = None
    """Ray's name of its node, once it runs."""
    in_flight: "dict[ray.ObjectRef, _Pending]" = field(default_factory=dict)
    """In the order given; the actor computes the first."""
    given: int = 0
    head_since: float = 0.0
    """When the first shard in flight became the first."""


class Coordinator:
    """Runs shards of a plan on Ray actors; a Ray session must be open.

    Args:
        plan: what every actor is told.
        shards: the shards by number.
        listener: told of each finished shard, in the order in which they end, and of failures.
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
        self._timeouts = ShardTimeouts(self._cluster.shard_timeout_seconds)
        self._kills = KernelKills()
        # Nodes of lost actors that could not be reached: whether these are gone is known some seconds later.
        self._unreachable: list[str] = []
        self._queue: deque[_Pending] = deque()
        self._actors: list[_Actor] = []
        self._failed: list[FailedShard] = []
        self._failed_starts: list[str] = []
        self._any_started = False
        self._serial = 0
        self._slots = ActorSlots(0, 0, 1)
        self._next_count = self._next_notice = 0.0

    def run(self, pending: Sequence[int]) -> list[FailedShard]:
        """Do the shards of these numbers; returns those that could not be done.

        All actors are ended when this returns or raises, also by an interrupt.

        Raises:
            ClusterError: the cluster has no room for an actor.
            ExtractionError: no actor can start, or the disk is full.
        """
        self._queue.extend(map(_Pending, pending))
        self._next_notice = time.monotonic() + SECONDS_BETWEEN_NOTICES
        try:
            while self._queue or any(actor.in_flight for actor in self._actors):
                self._check()
                self._start_actors()
                self._hand_out()
                self._end_overdue()
                self._collect()
            self._tell_unreachable(last=True)
            return self._failed
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)
                self._crash_file(actor).unlink(missing_ok=True)
            self._actors.clear()

    def _start_actors(self) -> None:
        """Start actors up to the cluster's slots (which may grow), but no more than there is work for."""
        now = time.monotonic()
        if now >= self._next_count:
            self._slots = actor_slots(self._cluster, self._device, wait=self._any_started)
            self._next_count = now + SECONDS_BETWEEN_COUNTS
            self._kills.forget_old()
            self._tell_unreachable()
        busy = sum(bool(actor.in_flight) for actor in self._actors)
        wanted = min(self._slots.count, busy + len(self._queue))
        limit = self._cluster.attempts * (self._slots.count if self._any_started else 1)
        while len(self._actors) < wanted:
            if len(self._failed_starts) >= limit:
                if not self._actors:
                    raise ExtractionError(f"no actor can start: {self._failed_starts[-1]}")
                return
            self._start_actor()

    def _start_actor(self) -> None:
        slots = self._slots
        actor_class: Any = ray.remote(ShardWorker).options(
            num_cpus=slots.num_cpus,
            num_gpus=slots.num_gpus,
            max_restarts=0,
            max_concurrency=IN_FLIGHT,
            runtime_env={"env_vars": worker_environment(slots.num_cpus, slots.num_gpus)},
        )
        # What a driver that was killed may have left would be taken for this actor's.
        crash_file(self._plan, self._serial).unlink(missing_ok=True)
        handle = actor_class.remote(self._plan, bool(slots.num_gpus), self._serial)
        self._actors.append(_Actor(self._serial, handle, handle.prepare.remote(), handle.greet.remote()))
        self._serial += 1

    def _hand_out(self) -> None:
        """Give every idle actor a shard, then a second one to decode ahead while shards outnumber free actors."""
        for depth in range(IN_FLIGHT):
            for actor in self._actors:
                free = sum(not other.in_flight for other in self._actors)
                if actor.starting is None and len(actor.in_flight) == depth and (not depth or len(self._queue) > free):
                    self._give_next(actor)

    def _give_next(self, actor: _Actor) -> None:
        if any(pending.suspect for pending in actor.in_flight.values()):
            return
        others = {other.serial for other in self._actors if other is not actor and other.placing is None}
        for pending in self._queue:
            if pending.suspect and actor.in_flight:
                continue
            # A shard that failed here waits for another actor, if there is one, also while that loads the model.
            if actor.serial not in pending.tried_by or not others - pending.tried_by:
                break
        else:
            return
        self._queue.remove(pending)
        info = self._shards[pending.number]
        task = ShardTask(pending.number, info, pending.attempts + 1, actor.given)
        if not actor.in_flight:
            actor.head_since = time.monotonic()
        actor.in_flight[actor.handle.extract.remote(task)] = pending
        actor.given += 1

    def _collect(self) -> None:
        """Wait for the next news from any actor, and act on it."""
        owners: dict[ray.ObjectRef, _Actor] = {}
        for actor in self._actors:
            news = [actor.placing, actor.starting, *actor.in_flight]
            owners |= {reference: actor for reference in news if reference is not None}
        if not owners:
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for reference in ready:
            self._settle(owners[reference], reference)
        self._notice_waiting()

    def _settle(self, actor: _Actor, reference: "ray.ObjectRef") -> None:
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            # The actor, its node or its memory is gone; whatever it had is handed out again.
            self._lose_actor(actor, error)
            return
        if reference == actor.placing:
            actor.placing, actor.placed_since, actor.node = None, time.monotonic(), outcome
        elif reference == actor.starting:
            actor.starting = None
            if isinstance(outcome, Failure):
                self._end_actor(actor, NOT_STARTED, outcome.reason, failed_to_start=True)
            else:
                self._any_started = True
        else:
            self._settle_shard(actor, reference, outcome)

    def _settle_shard(self, actor: _Actor, reference: "ray.ObjectRef", outcome: Receipt | Failure) -> None:
        is_first, now = reference == next(iter(actor.in_flight)), time.monotonic()
        pending = actor.in_flight.pop(reference)
        if isinstance(outcome, Receipt) and is_first:
            self._timeouts.finished(now - actor.head_since, self._shards[pending.number].samples)
        if is_first:
            actor.head_since = now
        if isinstance(outcome, Receipt):
            self._listener.enter(outcome)
            return
        if outcome.full:
            raise ExtractionError(
                f"{outcome.reason}, then run the same command again, {self._shards[pending.number].name} and the other "
                "shards that are not done will be"
            )
        self._count_failure(pending, actor, outcome.reason)
        if outcome.broken:
            # Such as a CUDA context that no kernel can use any more.
            self._end_actor(actor, BROKEN, outcome.reason)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for actor in list(self._actors):
            if actor.starting is not None and actor.placed_since is not None:
                if now - actor.placed_since > self._timeouts.to_start:
                    reason = f"loading the model took longer than {self._limit_in_words(self._timeouts.to_start)}"
                    self._end_actor(actor, NOT_STARTED, reason, failed_to_start=True)
            elif actor.in_flight:
                first = next(iter(actor.in_flight))
                pending = actor.in_flight[first]
                limit = self._timeouts.limit(self._shards[pending.number].samples, pending.attempts)
                if now - actor.head_since > limit:
                    # It computes the first; the one that waits is not to blame.
                    del actor.in_flight[first]
                    reason = f"it took longer than {self._limit_in_words(limit)}"
                    self._end_actor(actor, HUNG, reason)
                    self._count_failure(pending, actor, reason)

    def _limit_in_words(self, limit: float) -> str:
        automatic = ", automatic" if self._cluster.shard_timeout_seconds == "auto" else ""
        return f"cluster.shard_timeout_seconds ({limit:.0f} s{automatic})"

    def _lose_actor(self, actor: _Actor, error: Exception) -> None:
        """Count the one shard of a lost actor as failed; of two, find out which it is by handing them out alone."""
        is_here = actor.node is not None and actor.node == current_node()
        loss = explain_loss(
            error,
            node=actor.node,
            crash_file=self._crash_file(actor),
            killed_by_kernel=self._kills.claim if is_here else None,
        )
        reason = f"its actor was lost: {loss.text}{_remedy(loss)}"
        shards = list(actor.in_flight.values())
        if len(shards) == 1:
            actor.in_flight.clear()
            self._count_failure(shards[0], actor, reason)
        for pending in shards:
            pending.suspect = True
        self._end_actor(actor, loss.cause, reason)

    def _end_actor(self, actor: _Actor, cause: str, reason: str, *, failed_to_start: bool = False) -> None:
        """End an actor; the shards that it still has are handed out again and do not count as failed."""
        ray.kill(actor.handle)
        self._actors.remove(actor)
        self._crash_file(actor).unlink(missing_ok=True)
        if cause == UNREACHABLE and actor.node is not None:
            self._unreachable.append(actor.node)
        else:
            self._listener.actor_lost(cause)
        if failed_to_start or actor.starting is not None:
            self._failed_starts.append(reason)
        self._queue.extendleft(reversed(actor.in_flight.values()))

    def _tell_unreachable(self, last: bool = False) -> None:
        """Count lost actors that could not be reached once their nodes are known to be gone, or at the ``last``."""
        for node in list(self._unreachable):
            gone = not node_is_alive(node)
            if gone or last:
                self._unreachable.remove(node)
                self._listener.actor_lost(NODE if gone else UNREACHABLE)

    def _crash_file(self, actor: _Actor) -> Path:
        return crash_file(self._plan, actor.serial)

    def _count_failure(self, pending: _Pending, actor: _Actor, reason: str) -> None:
        self._listener.attempt_failed()
        pending.attempts += 1
        pending.tried_by.add(actor.serial)
        if pending.attempts < self._cluster.attempts:
            self._queue.appendleft(pending)
        else:
            self._failed.append(FailedShard(self._shards[pending.number].name, reason))

    def _notice_waiting(self) -> None:
        """Say so when nothing happens because the cluster gives no actor its place."""
        now = time.monotonic()
        if any(actor.starting is None for actor in self._actors):
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
