"""Which actor gets which shard, when one counts as hung, and what becomes of what fails: decisions alone, without Ray.

Events go in with the time of a monotonic clock, decisions come out. :mod:`codec_dist.extraction.coordinator` carries
them out.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from codec_dist.extraction.errors import ExtractionError

IN_FLIGHT = 2
"""Shards that an actor has at once: it computes the first and decodes the next."""

# Until enough shards are done to judge by.
START_SECONDS = 3600.0
SHARDS_TO_JUDGE_BY = 3
# Of the median. Shards of one size differ by the size of their images and by what else the machine does.
FACTOR = 10.0
FLOOR_SECONDS = 300.0


@dataclass(frozen=True)
class FailedShard:
    """A shard that was given up, after all its attempts."""

    name: str
    reason: str


@dataclass(frozen=True)
class Assignment:
    """A shard that is handed to an actor."""

    actor: int
    shard: int
    attempt: int
    """1 for the first."""
    turn: int
    """How many shards the actor was given before."""


@dataclass(frozen=True)
class Overdue:
    """An actor that has taken too long, with its model or with a shard, and is to be ended."""

    actor: int
    limit: float
    """Seconds that it had."""
    shard: int | None
    """The shard that it computed; None: it was loading the model."""


@dataclass(eq=False)
class _Pending:
    """A shard that is not done."""

    number: int
    attempts: int = 0
    tried_by: set[int] = field(default_factory=set)
    quarantined: bool = False
    """An actor was lost while it had this shard and another: it is handed out alone from then on."""


@dataclass
class _Actor:
    loaded: bool = False
    placed_since: float | None = None
    """When it came to its place in the cluster; None: it waits for one."""
    shards: list[_Pending] = field(default_factory=list)
    """In the order given; it computes the first."""
    given: int = 0
    first_since: float = 0.0
    """When the first of its shards became the first."""


class ShardTimeouts:
    """Time limits of shards: as set, or from the times that shards of this run took.

    Args:
        setting: seconds, or ``auto``.
    """

    def __init__(self, setting: float | str) -> None:
        self._setting = None if setting == "auto" else float(setting)
        self._seconds_per_sample: list[float] = []

    def finished(self, seconds: float, samples: int) -> None:
        """Take in the time that a shard of so many samples took."""
        self._seconds_per_sample.append(seconds / max(1, samples))

    @property
    def to_start(self) -> float:
        """Seconds for loading the model."""
        return START_SECONDS if self._setting is None else self._setting

    def limit(self, samples: int, attempts: int = 0) -> float:
        """Seconds for a shard of so many samples that failed ``attempts`` times before.

        With ``auto`` each attempt has twice the time of the one before, so that a machine that has become slow is not
        taken for one that hangs.
        """
        if self._setting is not None:
            return self._setting
        limit = START_SECONDS
        if len(self._seconds_per_sample) >= SHARDS_TO_JUDGE_BY:
            limit = max(FLOOR_SECONDS, FACTOR * median(self._seconds_per_sample) * samples)
        return float(limit * 2**attempts)


class ShardScheduler:
    """Shards, the actors that work on them, and the rules by which these meet.

    An idle actor gets a shard; a second one, to decode ahead, only while shards outnumber idle actors. A shard that
    failed goes to an actor that has not tried it, if there is one. When an actor is lost with one shard, the shard
    has failed; with two, either may be the cause: both are quarantined, that is handed out alone, and none has failed.

    Args:
        names: of all shards, by number.
        samples: of all shards, by number.
        pending: numbers of the shards that are to be done.
        attempts: how often a shard is tried before it is given up.
        timeouts: time limits of shards.
    """

    def __init__(
        self,
        names: Sequence[str],
        samples: Sequence[int],
        pending: Sequence[int],
        *,
        attempts: int,
        timeouts: ShardTimeouts,
    ) -> None:
        self._names, self._samples, self._attempts, self._timeouts = names, samples, attempts, timeouts
        self._queue = deque(map(_Pending, pending))
        self._actors: dict[int, _Actor] = {}
        self._next_actor = 0
        self._failed_starts: list[str] = []
        self._any_loaded = False
        self.failed: list[FailedShard] = []
        """Shards that were given up."""

    @property
    def is_done(self) -> bool:
        """Whether every shard is finished or given up."""
        return not self._queue and not any(actor.shards for actor in self._actors.values())

    @property
    def any_loaded(self) -> bool:
        """Whether any actor has ever loaded the model."""
        return self._any_loaded

    @property
    def is_waiting(self) -> bool:
        """Whether no actor that is there has loaded the model yet."""
        return not any(actor.loaded for actor in self._actors.values())

    def start_actors(self, slots: int) -> list[int]:
        """Numbers of actors that are to be started now: up to the cluster's slots, but no more than there is work for.

        Raises:
            ExtractionError: actors failed to start too often, and none is left.
        """
        busy = sum(bool(actor.shards) for actor in self._actors.values())
        wanted = min(slots, busy + len(self._queue))
        limit = self._attempts * (slots if self._any_loaded else 1)
        started = []
        while len(self._actors) < wanted:
            if len(self._failed_starts) >= limit:
                if not self._actors:
                    raise ExtractionError(f"no actor can start: {self._failed_starts[-1]}")
                break
            self._actors[self._next_actor] = _Actor()
            started.append(self._next_actor)
            self._next_actor += 1
        return started

    def assignments(self, now: float) -> Iterator[Assignment]:
        """Hand out shards; each assignment counts as carried out when the iterator goes on."""
        for depth in range(IN_FLIGHT):
            for number, actor in self._actors.items():
                idle = sum(not each.shards for each in self._actors.values())
                if actor.loaded and len(actor.shards) == depth and (not depth or len(self._queue) > idle):
                    pending = self._next_for(number)
                    if pending is None:
                        continue
                    if not actor.shards:
                        actor.first_since = now
                    actor.shards.append(pending)
                    yield Assignment(number, pending.number, pending.attempts + 1, actor.given)
                    actor.given += 1

    def actor_placed(self, actor: int, now: float) -> None:
        """An actor has come to its place in the cluster, and loads the model."""
        self._actors[actor].placed_since = now

    def actor_loaded(self, actor: int) -> None:
        """An actor has loaded the model."""
        self._actors[actor].loaded = self._any_loaded = True

    def shard_finished(self, actor: int, shard: int, now: float) -> None:
        """An actor has done a shard."""
        since = self._actors[actor].first_since
        _, was_first = self._take(actor, shard, now)
        if was_first:
            self._timeouts.finished(now - since, self._samples[shard])

    def shard_failed(self, actor: int, shard: int, reason: str, now: float) -> None:
        """An actor could not do a shard, and goes on."""
        pending, _ = self._take(actor, shard, now)
        self._count_failure(pending, actor, reason)

    def actor_lost(self, actor: int, reason: str) -> bool:
        """An actor died with whatever it had; returns whether that was one shard, which so has failed."""
        shards = self._actors[actor].shards
        failed = len(shards) == 1
        for pending in shards:
            pending.quarantined = True
        if failed:
            self._count_failure(shards.pop(), actor, reason)
        self.end_actor(actor, reason)
        return failed

    def end_actor(self, actor: int, reason: str) -> None:
        """An actor is ended; the shards that it still has are handed out again and do not count as failed."""
        ended = self._actors.pop(actor)
        if not ended.loaded:
            self._failed_starts.append(reason)
        self._queue.extendleft(reversed(ended.shards))

    def overdue(self, now: float) -> list[Overdue]:
        """Actors that have taken too long, each to be ended by :meth:`end_overdue`."""
        found = []
        for number, actor in self._actors.items():
            if not actor.loaded:
                limit = self._timeouts.to_start
                if actor.placed_since is not None and now - actor.placed_since > limit:
                    found.append(Overdue(number, limit, None))
            elif actor.shards:
                first = actor.shards[0]
                limit = self._timeouts.limit(self._samples[first.number], first.attempts)
                if now - actor.first_since > limit:
                    # It computes the first; the one that waits is not the cause.
                    found.append(Overdue(number, limit, first.number))
        return found

    def end_overdue(self, overdue: Overdue, reason: str) -> None:
        """An actor that took too long is ended; the shard that it computed has failed."""
        actor = self._actors[overdue.actor]
        first = actor.shards.pop(0) if overdue.shard is not None else None
        self.end_actor(overdue.actor, reason)
        if first is not None:
            self._count_failure(first, overdue.actor, reason)

    def _next_for(self, number: int) -> _Pending | None:
        """Take the next shard that an actor may have out of the queue."""
        actor = self._actors[number]
        if any(pending.quarantined for pending in actor.shards):
            return None
        others = {other for other, each in self._actors.items() if other != number and each.placed_since is not None}
        for pending in self._queue:
            if pending.quarantined and actor.shards:
                continue
            # A shard that failed here waits for another actor, if there is one, also while that loads the model.
            if number not in pending.tried_by or not others - pending.tried_by:
                self._queue.remove(pending)
                return pending
        return None

    def _take(self, number: int, shard: int, now: float) -> tuple[_Pending, bool]:
        """Take a shard from its actor; whether it was the first."""
        actor = self._actors[number]
        place = next(place for place, pending in enumerate(actor.shards) if pending.number == shard)
        if place == 0:
            actor.first_since = now
        return actor.shards.pop(place), place == 0

    def _count_failure(self, pending: _Pending, actor: int, reason: str) -> None:
        pending.attempts += 1
        pending.tried_by.add(actor)
        if pending.attempts < self._attempts:
            self._queue.appendleft(pending)
        else:
            self.failed.append(FailedShard(self._names[pending.number], reason))
