"""How long a shard may take follows from those that are done, where it is left to that."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec_dist.extraction.scheduling import ShardTimeouts


def test_a_number_is_the_limit_whatever_was_measured() -> None:
    timeouts = ShardTimeouts(40.0)
    for _ in range(5):
        timeouts.finished(1000.0, 10)
    assert (timeouts.to_start, timeouts.limit(10), timeouts.limit(500, attempts=2)) == (40.0, 40.0, 40.0)


def test_auto_begins_with_an_hour_and_follows_the_median_after_three_shards() -> None:
    timeouts = ShardTimeouts("auto")
    assert timeouts.limit(1000) == timeouts.to_start == 3600
    for seconds in (60.0, 900.0):
        timeouts.finished(seconds, 1000)
        assert timeouts.limit(1000) == 3600
    timeouts.finished(70.0, 1000)
    assert timeouts.limit(1000) == pytest.approx(10 * 70)  # the median of 60, 70 and 900
    assert timeouts.limit(2000) == pytest.approx(10 * 140)  # a shard of twice the size
    assert timeouts.limit(1000, attempts=2) == pytest.approx(4 * 10 * 70)
    assert timeouts.to_start == 3600


def test_short_shards_have_five_minutes() -> None:
    timeouts = ShardTimeouts("auto")
    for _ in range(3):
        timeouts.finished(0.5, 100)
    assert timeouts.limit(100) == 300
    assert timeouts.limit(0) == 300


@given(st.lists(st.floats(1e-3, 1e5), min_size=3, max_size=40))
def test_no_shard_of_the_usual_speed_is_ever_ended(seconds: list[float]) -> None:
    timeouts = ShardTimeouts("auto")
    for each in seconds:
        timeouts.finished(each, 100)
    usual = sorted(seconds)[len(seconds) // 2]
    assert timeouts.limit(100) >= (5 * usual if len(seconds) % 2 == 0 else 9.99 * usual)
