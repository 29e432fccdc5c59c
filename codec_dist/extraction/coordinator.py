"""The coordinator: hands shards to actors by dynamic pull, and outlives actors, nodes and bad shards."""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from codec_dist.cluster_runtime import ActorSlots, actor_slots, worker_environment
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan
from codec_dist.extraction.worker import Failure, Receipt, ShardTask, ShardWorker
from codec_dist.shards import ShardInfo

IN_FLIGHT = 2
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_COUNTS = 10.0
SECONDS_BETWEEN_NOTICES = 60.0


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

    def actor_lost(self) -> None:
        """An actor has died, hung or broken, and is replaced if there is work."""


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
            return self._failed
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)
            self._actors.clear()

    def _start_actors(self) -> None:
        """Start actors up to the cluster's slots (which may grow), but no more than there is work for."""
        now = time.monotonic()
        if now >= self._next_count:
            self._slots = actor_slots(self._cluster, self._device, wait=self._any_started)
            self._next_count = now + SECONDS_BETWEEN_COUNTS
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
            self._lose_actor(actor, f"its actor was lost ({type(error).__name__}): {_first_sentence(error)}")
            return
        if reference == actor.placing:
            actor.placing, actor.placed_since = None, time.monotonic()
        elif reference == actor.starting:
            actor.starting = None
            if isinstance(outcome, Failure):
                self._end_actor(actor, outcome.reason, failed_to_start=True)
            else:
                self._any_started = True
        else:
            self._settle_shard(actor, reference, outcome)

    def _settle_shard(self, actor: _Actor, reference: "ray.ObjectRef", outcome: Receipt | Failure) -> None:
        if reference == next(iter(actor.in_flight)):
            actor.head_since = time.monotonic()
        pending = actor.in_flight.pop(reference)
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
            self._end_actor(actor, outcome.reason)

    def _end_overdue(self) -> None:
        limit = self._cluster.shard_timeout_seconds
        now = time.monotonic()
        for actor in list(self._actors):
            if actor.starting is not None and actor.placed_since is not None and now - actor.placed_since > limit:
                reason = f"loading the model took longer than cluster.shard_timeout_seconds ({limit:g} s)"
                self._end_actor(actor, reason, failed_to_start=True)
            elif actor.in_flight and now - actor.head_since > limit:
                # It computes the first; the one that waits is not to blame.
                pending = actor.in_flight.pop(next(iter(actor.in_flight)))
                reason = f"it took longer than cluster.shard_timeout_seconds ({limit:g} s)"
                self._end_actor(actor, reason)
                self._count_failure(pending, actor, reason)

    def _lose_actor(self, actor: _Actor, reason: str) -> None:
        """Count the one shard of a lost actor as failed; of two, find out which it is by handing them out alone."""
        shards = list(actor.in_flight.values())
        if len(shards) == 1:
            actor.in_flight.clear()
            self._count_failure(shards[0], actor, reason)
        for pending in shards:
            pending.suspect = True
        self._end_actor(actor, reason)

    def _end_actor(self, actor: _Actor, reason: str, *, failed_to_start: bool = False) -> None:
        """End an actor; the shards that it still has are handed out again and do not count as failed."""
        ray.kill(actor.handle)
        self._actors.remove(actor)
        self._listener.actor_lost()
        if failed_to_start or actor.starting is not None:
            self._failed_starts.append(reason)
        self._queue.extendleft(reversed(actor.in_flight.values()))

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


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
