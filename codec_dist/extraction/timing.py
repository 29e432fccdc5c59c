"""Where the time of an actor goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class TimeSplit:
    """Seconds of an actor, of one shard or of many.

    ``decode_wait``, ``compute`` and ``idle`` follow one another and add up to the actor's time; ``write``
    goes on beside them, while the next shard is computed.
    """

    decode_wait: float = 0.0
    """Waited for images to be read, decoded and prepared."""
    compute: float = 0.0
    """Attributed, and gathered the rows."""
    write: float = 0.0
    """Checked and wrote the block."""
    idle: float = 0.0
    """Between two shards: had none, or the last one's block was still being written."""

    def __add__(self, other: "TimeSplit") -> "TimeSplit":
        return TimeSplit(
            self.decode_wait + other.decode_wait,
            self.compute + other.compute,
            self.write + other.write,
            self.idle + other.idle,
        )

    @property
    def wall(self) -> float:
        """The actor's time, without what it wrote meanwhile."""
        return self.decode_wait + self.compute + self.idle

    def fractions(self) -> dict[str, float]:
        """Each kind as a fraction of the actor's time; ``write`` can be in the time of the others."""
        return {kind: seconds / max(self.wall, 1e-9) for kind, seconds in asdict(self).items()}


@dataclass
class Stopwatch:
    """Adds up seconds by kind."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count the time of a block as ``kind``."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(kind, time.monotonic() - started)

    def add(self, kind: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def split(self) -> TimeSplit:
        """What was counted."""
        return TimeSplit(**self.seconds)
