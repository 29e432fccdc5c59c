"""The account of a run: what is done, dropped and failed, and where the time went; shown as it grows."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from codec_dist.config import Config
from codec_dist.extraction.agreement import NOTHING_EXPECTED, Agreement, Expectation, warnings_of
from codec_dist.extraction.completeness import Completeness
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.worker import Receipt, TimeSplit
from codec_dist.shards import ShardInfo
from codec_dist.store import Marker
from codec_dist.tracking import Tracker
from codec_dist.utils import Progress

# How many samples an error message names.
NAMED = 3


@dataclass(frozen=True)
class ExtractionSummary:
    """What an extraction did, and what its store holds."""

    shards_done: int
    """Shards that this run finished."""
    shards_skipped: int
    """Shards that were done before."""
    samples: int
    """Rows in the store."""
    dropped: int
    """Samples of the store's shards that have no row."""
    failed: int
    """Shards that could not be done."""
    seconds: float
    """Wall time of this run."""
    images_per_second: float
    """Images of this run per second of wall time, start of the actors included; 0 if nothing was to do."""
    retries: int = 0
    """Attempts at shards that failed."""
    actors_lost: int = 0
    """Actors that died, hung or broke, and were replaced while there was work."""
    causes: dict[str, int] = field(default_factory=dict)
    """Why these were lost, in a few words, and how many for each cause."""
    decode_wait_fraction: float = 0.0
    """Part of the actors' time in which they waited for images."""
    compute_fraction: float = 0.0
    """Part in which they computed."""
    write_fraction: float = 0.0
    """Writing as a part of the actors' time; it goes on beside the other kinds."""
    idle_fraction: float = 0.0
    """Part between two shards."""
    labelled: int = 0
    """Images of the store that have a label."""
    accuracy: float | None = None
    """Fraction of these whose prediction is their label; None where there is none."""
    worst_residual: float | None = None
    """Median relative completeness residual of the worst cut layer; None where no layer has one."""
    mean_steps: float | None = None
    """Steps of an image's path on average, where paths are refined."""


@dataclass
class _ActorAccount:
    shards: int = 0
    images: int = 0
    times: TimeSplit = field(default_factory=TimeSplit)

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.times.wall, 1e-9)


class Account:
    """Counts what is done; gets every receipt, failed attempt and lost actor, and reports to the user and the tracker.

    Args:
        max_bad_fraction: limit of dropped samples.
        shards: by number.
        before: markers of the shards that were done before this run.
        tracker: gets a point for every finished shard.
        agreement: labels and predictions of the shards that were done before.
        expected: what is known of labels and predictions before any is seen.
    """

    def __init__(
        self,
        max_bad_fraction: float,
        shards: Sequence[ShardInfo],
        before: Mapping[int, Marker],
        tracker: Tracker | None,
        agreement: Agreement | None = None,
        expected: Expectation = NOTHING_EXPECTED,
    ) -> None:
        self.total = sum(shard.samples for shard in shards)
        self.rows = sum(marker.rows for marker in before.values())
        self.dropped = [
            (shards[number].name, key, reason) for number, marker in before.items() for key, reason in marker.dropped
        ]
        self.progress: Progress | None = None
        self._limit, self._shards, self._tracker = max_bad_fraction, shards, tracker
        self._done_before = len(before)
        self._done = self._images = self._retries = 0
        self._lost: Counter[str] = Counter()
        self._actors: dict[int, _ActorAccount] = {}
        self._started = time.monotonic()
        self.agreement = agreement or Agreement()
        self._expected = expected
        self._completeness = Completeness({})
        self._next_look = 1
        self._warned: set[str] = set()
        self._said: tuple[int, set[str]] = (0, set())

    def enter(self, receipt: Receipt) -> None:
        """Count a finished shard.

        Raises:
            ExtractionError: by now too many samples are bad.
        """
        shard = self._shards[receipt.number].name
        images = receipt.rows + len(receipt.dropped)
        self._done += 1
        self._images += images
        self.rows += receipt.rows
        self.dropped += [(shard, key, reason) for key, reason in receipt.dropped]
        self.agreement.merge(receipt.agreement)
        actor = self._actors.setdefault(receipt.actor, _ActorAccount())
        actor.shards += 1
        actor.images += images
        actor.times += receipt.times
        if self.progress is not None:
            self.progress.advance(images, self._note())
        if self._tracker is not None:
            self._tracker.log(self._metrics(receipt, images), step=self._done_before + self._done, axis="shards")
        self._look_at_labels()
        self.check_bad()

    def attempt_failed(self) -> None:
        """Count an attempt at a shard that failed."""
        self._retries += 1

    def actor_lost(self, cause: str) -> None:
        """Count an actor that died, hung or broke."""
        self._lost[cause] += 1
        if self.progress is not None:
            self.progress.advance(0, self._note())

    def check_bad(self) -> None:
        """Refuse to go on with more bad samples than the config allows."""
        if len(self.dropped) > self._limit * self.total:
            named = "; ".join(f"{key} in {shard}: {reason}" for shard, key, reason in self.dropped[:NAMED])
            raise ExtractionError(
                f"{len(self.dropped):,} of {self.total:,} samples cannot be used, more than data.max_bad_fraction "
                f"({self._limit:g}) allows: {named}; repair them or raise the limit"
            )

    def say_completeness(self, completeness: Completeness, config: Config) -> None:
        """Say how far contributions are from adding up; the summary holds it, too."""
        self._completeness = completeness
        for line in completeness.lines(config):
            _to_stderr(f"extract: {line}")

    def summary(self, failed: int, seconds: float) -> ExtractionSummary:
        """The account so far, which is given to the tracker, too."""
        rate = self._images / seconds if self._images else 0.0
        fractions = self._fractions() if self._actors else {}
        summary = ExtractionSummary(
            self._done, self._done_before, self.rows, len(self.dropped), failed, seconds, rate,
            self._retries, self._lost.total(), dict(self._lost), **fractions,
            labelled=self.agreement.labelled, accuracy=self.agreement.accuracy,
            worst_residual=self._completeness.worst and self._completeness.worst[1],
            mean_steps=self._completeness.steps,
        )  # fmt: skip
        self._say_accuracy(warnings_of(self.agreement, self._expected))
        if self._tracker is not None:
            numbers = {name: value for name, value in vars(summary).items() if name != "causes" and value is not None}
            numbers |= {f"residual/{layer}": value for layer, value in self._completeness.residuals.items()}
            numbers |= {f"actors_lost/{cause}": count for cause, count in self._lost.items()}
            self._tracker.summary({f"extract/{name}": value for name, value in numbers.items()})
            if self._actors:
                self._table_of_actors(self._tracker)
        return summary

    def _look_at_labels(self) -> None:
        """Say the accuracy after the first shard with labels, and what is suspicious as soon as it shows."""
        if self.agreement.labelled < self._next_look:
            return
        first, self._next_look = not self._warned and self._next_look == 1, 2 * self.agreement.labelled
        found = warnings_of(self.agreement, self._expected)
        new = {kind: text for kind, text in found.items() if kind not in self._warned}
        self._warned |= new.keys()
        if first or new:
            self._say_accuracy(new)

    def _say_accuracy(self, warnings: Mapping[str, str]) -> None:
        if self.agreement.labelled and (self.agreement.labelled, set(warnings)) != self._said:
            self._said = self.agreement.labelled, set(warnings)
            counted = f"{self.agreement.labelled:,} labelled image{'s' if self.agreement.labelled > 1 else ''}"
            lines = [f"accuracy {100 * self.agreement.right / self.agreement.labelled:.1f} % on {counted}"]
            for line in [*lines, *(f"warning: {text}" for text in warnings.values())]:
                say = self.progress.say if self.progress is not None else _to_stderr
                say(f"extract: {line}")

    def _note(self) -> str:
        times = self._times().fractions()
        parts = [
            f"{self._done_before + self._done:,} of {len(self._shards):,} shards",
            f"compute {times['compute']:.0%}",
            f"decode wait {times['decode_wait']:.0%}",
            f"write {times['write']:.0%}",
            f"idle {times['idle']:.0%}",
        ]
        counts = {"dropped": len(self.dropped), "failed attempts": self._retries}
        lost = [f"{self._lost.total():,} actors lost ({spell_causes(self._lost)})"] if self._lost else []
        return ", ".join([*parts, *(f"{count:,} {name}" for name, count in counts.items() if count), *lost])

    def _metrics(self, receipt: Receipt, images: int) -> dict[str, float]:
        actor = self._actors[receipt.actor]
        own = {f"extract/actor_{kind}_fraction": part for kind, part in actor.times.fractions().items()}
        return {
            "extract/samples": float(self.rows),
            "extract/dropped": float(len(self.dropped)),
            **({} if self.agreement.accuracy is None else {"extract/accuracy": self.agreement.accuracy}),
            "extract/images_per_second": self._images / (time.monotonic() - self._started),
            "extract/shard_seconds": receipt.seconds,
            "extract/shard_images_per_second": images / max(receipt.seconds, 1e-9),
            "extract/failed_attempts": float(self._retries),
            "extract/actors_lost": float(self._lost.total()),
            **{f"extract/{name}": value for name, value in self._fractions().items()},
            # Which actor the shard was done by, and that actor's time so far.
            "extract/actor": float(receipt.actor),
            "extract/actor_images_per_second": actor.images_per_second,
            **own,
        }

    def _times(self) -> TimeSplit:
        return sum((actor.times for actor in self._actors.values()), TimeSplit())

    def _fractions(self) -> dict[str, float]:
        return {f"{kind}_fraction": part for kind, part in self._times().fractions().items()}

    def _table_of_actors(self, tracker: Tracker) -> None:
        columns = ["actor", "shards", "images", "images per second", *TimeSplit().fractions()]
        rows = [
            [serial, each.shards, each.images, each.images_per_second, *each.times.fractions().values()]
            for serial, each in sorted(self._actors.items())
        ]
        tracker.table("extract/actors", columns, rows)


def spell_causes(causes: Mapping[str, int]) -> str:
    """``2 killed for memory, 1 node gone``."""
    return ", ".join(f"{count:,} {cause}" for cause, count in causes.items())


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
