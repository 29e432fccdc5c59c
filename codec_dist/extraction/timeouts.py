"""How long an actor may take for a shard before it counts as hung."""

from statistics import median

# Until enough shards are done to judge by.
START_SECONDS = 3600.0
SHARDS_TO_JUDGE_BY = 3
# Of the median. Shards of one size differ by the size of their images and by what else the machine does.
FACTOR = 10.0
FLOOR_SECONDS = 300.0


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
