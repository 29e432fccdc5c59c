"""Which actor gets which shard: decided without Ray, so tried with events of any order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.scheduling import Assignment, Overdue, ShardScheduler, ShardTimeouts


def make(shards: int, attempts: int = 3, timeout: float | str = "auto") -> ShardScheduler:
    names, samples = [f"shard-{number}" for number in range(shards)], [10] * shards
    return ShardScheduler(names, samples, range(shards), attempts=attempts, timeouts=ShardTimeouts(timeout))


def with_actors(scheduler: ShardScheduler, slots: int) -> list[int]:
    """Actors that were started, came to their places and loaded the model."""
    started = scheduler.start_actors(slots)
    for actor in started:
        scheduler.actor_placed(actor, 0.0)
        scheduler.actor_loaded(actor)
    return started


def hand_out(scheduler: ShardScheduler, now: float = 0.0) -> list[tuple[int, int]]:
    return [(each.actor, each.shard) for each in scheduler.assignments(now)]


def test_actors_get_one_shard_each_and_then_a_second_to_decode_ahead() -> None:
    scheduler = make(5)
    assert with_actors(scheduler, 2) == [0, 1]
    assert list(scheduler.assignments(0.0)) == [
        Assignment(0, 0, 1, 0),
        Assignment(1, 1, 1, 0),
        Assignment(0, 2, 1, 1),
        Assignment(1, 3, 1, 1),
    ]
    assert hand_out(scheduler) == []
    scheduler.shard_finished(1, 1, 1.0)
    assert list(scheduler.assignments(1.0)) == [Assignment(1, 4, 1, 2)]


def test_no_second_shard_while_an_actor_that_still_loads_could_take_it() -> None:
    scheduler = make(2)
    scheduler.start_actors(2)
    scheduler.actor_loaded(0)
    assert hand_out(scheduler) == [(0, 0)]
    scheduler.actor_loaded(1)
    assert hand_out(scheduler) == [(1, 1)]


def test_no_more_actors_than_shards_and_slots() -> None:
    assert make(2).start_actors(5) == [0, 1]
    scheduler = make(9)
    assert scheduler.start_actors(3) == [0, 1, 2]
    assert scheduler.start_actors(4) == [3]
    assert scheduler.start_actors(4) == []


def test_a_shard_that_failed_goes_to_another_actor_where_there_is_one() -> None:
    scheduler = make(3)
    with_actors(scheduler, 2)
    assert hand_out(scheduler) == [(0, 0), (1, 1), (0, 2)]
    scheduler.shard_failed(0, 0, "truncated", 1.0)
    scheduler.shard_finished(0, 2, 2.0)
    assert hand_out(scheduler, 2.0) == []  # actor 0 has tried it
    scheduler.shard_finished(1, 1, 3.0)
    assert list(scheduler.assignments(3.0)) == [Assignment(1, 0, 2, 1)]
    scheduler.shard_failed(1, 0, "truncated", 4.0)
    assert hand_out(scheduler, 4.0) == [(0, 0)]  # nobody is left who has not
    scheduler.shard_failed(0, 0, "still truncated", 5.0)
    assert scheduler.is_done
    assert [(each.name, each.reason) for each in scheduler.failed] == [("shard-0", "still truncated")]


def test_the_only_actor_tries_again_itself() -> None:
    scheduler = make(1, attempts=2)
    with_actors(scheduler, 1)
    assert hand_out(scheduler) == [(0, 0)]
    scheduler.shard_failed(0, 0, "truncated", 1.0)
    assert hand_out(scheduler) == [(0, 0)]


def test_two_shards_of_a_lost_actor_are_handed_out_alone_and_only_the_deadly_one_fails() -> None:
    scheduler, deadly, lost = make(4, attempts=2), 1, 0
    held: dict[int, list[int]] = {}
    quarantined: set[int] = set()
    finished = []
    while not scheduler.is_done:
        held |= {actor: [] for actor in with_actors(scheduler, 2)}
        for actor, shard in hand_out(scheduler):
            held[actor].append(shard)
            assert len(held[actor]) == 1 or not quarantined & set(held[actor])
        actor = next(actor for actor, has in held.items() if has)
        if held[actor][0] == deadly:
            shards = held.pop(actor)
            assert scheduler.actor_lost(actor, "killed") is (len(shards) == 1)
            quarantined |= set(shards)
            lost += 1
        else:
            finished.append(held[actor].pop(0))
            scheduler.shard_finished(actor, finished[-1], 0.0)
    assert sorted(finished) == [0, 2, 3]
    assert [each.name for each in scheduler.failed] == ["shard-1"]
    assert lost == 3


def test_an_actor_that_hangs_is_overdue_with_the_shard_that_it_computes() -> None:
    scheduler = make(3, timeout=40.0)
    with_actors(scheduler, 1)
    assert hand_out(scheduler, 100.0) == [(0, 0), (0, 1)]
    assert scheduler.overdue(140.0) == []
    scheduler.shard_finished(0, 0, 130.0)
    assert hand_out(scheduler, 130.0) == [(0, 2)]
    (overdue,) = scheduler.overdue(171.0)
    assert overdue == Overdue(0, 40.0, 1)
    scheduler.end_overdue(overdue, "it took longer than 40 s")
    assert with_actors(scheduler, 1) == [1]
    assert list(scheduler.assignments(171.0)) == [Assignment(1, 1, 2, 0), Assignment(1, 2, 1, 1)]


def test_time_that_an_actor_waits_for_its_place_does_not_count() -> None:
    scheduler = make(1, timeout=40.0)
    scheduler.start_actors(1)
    assert scheduler.overdue(1000.0) == []
    scheduler.actor_placed(0, 1000.0)
    assert scheduler.overdue(1040.0) == []
    assert scheduler.overdue(1041.0) == [Overdue(0, 40.0, None)]


def test_actors_that_never_start_end_the_run_with_the_last_reason() -> None:
    scheduler = make(5, attempts=2)
    for reason in ("no weights", "no memory"):
        (actor,) = scheduler.start_actors(1)
        scheduler.end_actor(actor, reason)
    with pytest.raises(ExtractionError, match="no actor can start: no memory"):
        scheduler.start_actors(1)


def test_an_actor_that_works_goes_on_while_others_do_not_start() -> None:
    scheduler = make(5, attempts=1)
    with_actors(scheduler, 1)
    assert hand_out(scheduler) == [(0, 0), (0, 1)]
    for _ in range(2):
        (actor,) = scheduler.start_actors(2)
        scheduler.end_actor(actor, "no memory")
    assert scheduler.start_actors(2) == []


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))
def test_whatever_happens_each_shard_is_done_once_or_given_up_after_its_attempts(
    data: st.DataObject, shards: int, slots: int, attempts: int
) -> None:
    scheduler = make(shards, attempts)
    held: dict[int, list[int]] = {}
    finished: list[int] = []
    tries: Counter[int] = Counter()
    alone: set[int] = set()
    for step in range(1000):
        if scheduler.is_done:
            break
        for actor in with_actors(scheduler, slots):
            held[actor] = []
        for each in scheduler.assignments(float(step)):
            held[each.actor].append(each.shard)
            assert each.attempt == tries[each.shard] + 1
            assert len(held[each.actor]) <= 2
            assert len(held[each.actor]) == 1 or not alone & set(held[each.actor])
        everywhere = [shard for has in held.values() for shard in has]
        assert len(set(everywhere)) == len(everywhere)
        assert not set(everywhere) & set(finished)
        actor = data.draw(st.sampled_from([number for number, has in held.items() if has]))
        event = (
            data.draw(st.sampled_from(["finished", "finished", "failed", "lost", "ended"])) if step < 60 else "failed"
        )
        shard = data.draw(st.sampled_from(held[actor]))
        if event in ("lost", "ended"):
            has = held.pop(actor)
            if event == "ended":
                scheduler.end_actor(actor, "unfit")
            elif scheduler.actor_lost(actor, "killed"):
                tries[has[0]] += 1
            alone |= set(has) if event == "lost" else set()
        else:
            held[actor].remove(shard)
            if event == "finished":
                scheduler.shard_finished(actor, shard, float(step))
                finished.append(shard)
            else:
                scheduler.shard_failed(actor, shard, "bad", float(step))
                tries[shard] += 1
    assert scheduler.is_done
    given_up = {int(each.name.removeprefix("shard-")) for each in scheduler.failed}
    assert given_up == {shard for shard, count in tries.items() if count == attempts}
    assert sorted([*finished, *given_up]) == list(range(shards))
