"""The stage: plan, coordinate, finish the store, sum up."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from codec_dist.cluster_runtime import ray_session
from codec_dist.config import Config
from codec_dist.extraction.coordinator import Coordinator, FailedShard
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan, check_free_space, make_plan
from codec_dist.extraction.settling import settle
from codec_dist.extraction.worker import Receipt
from codec_dist.shards import ShardInfo
from codec_dist.store import Ledger, Marker, finish_store
from codec_dist.tracking import Tracker
from codec_dist.utils import Progress

# How many shards or samples an error message names.
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


def extract(
    config: Config,
    tracker: Tracker | None = None,
    *,
    session: Callable[[], AbstractContextManager[object]] | None = None,
) -> ExtractionSummary:
    """Attribute every image of a run's shards and store the results, on Ray.

    Shards that the store holds already are not done again. Killed or interrupted at any moment, the same
    call goes on where it stopped, and the store's digest is the same.

    Args:
        config: the whole config; the store is at ``run.directory``/store.
        tracker: gets the rates as shards end, and the summary.
        session: opens Ray for the length of a block; entered only when all is checked and shards are
            pending. By default a session of this call alone, as ``config.cluster`` says.

    Raises:
        ExtractionError: shards failed (named with their reasons) or too many samples are bad, after
            everything else was done or at once; or the extraction cannot start.
        CodecError: what :func:`make_plan` and the cluster refuse; no actor has started then.
    """
    started = time.monotonic()
    plan, shards = make_plan(config)
    before = Ledger(plan.store).done() if plan.store_exists else {}
    pending = [number for number in range(len(shards)) if number not in before]
    account = _Account(config, shards, before, tracker)
    account.check_bad()
    failed: list[FailedShard] = []
    if pending:
        check_free_space(plan, [shards[number] for number in pending])
        with (
            Progress("extract", account.total, "images", done=account.rows + len(account.dropped)) as progress,
            session() if session is not None else ray_session(config.cluster),
        ):
            account.progress = progress
            settled, device = settle(plan, shards)
            failed = Coordinator(settled, shards, account.enter, device).run(pending)
    if not failed and (pending or not (plan.store / "samples.parquet").exists()):
        finish_store(plan.store)
    summary = account.summary(len(before), len(failed), time.monotonic() - started)
    if tracker is not None:
        tracker.summary({f"extract/{name}": value for name, value in vars(summary).items()})
    if failed:
        raise ExtractionError(_name_failures(failed, len(shards)))
    if tracker is not None:
        _link_artifacts(config, plan, tracker)
    return summary


def _link_artifacts(config: Config, plan: Plan, tracker: Tracker) -> None:
    shards, store = f"{config.run.name}-shards", f"{config.run.name}-store"
    source = plan.location
    tracker.artifact(shards, "shards", source if "://" in source else Path(source))
    tracker.artifact(store, "store", plan.store, uses=[shards])


class _Account:
    """Counts what is done; told of every receipt."""

    def __init__(
        self, config: Config, shards: Sequence[ShardInfo], before: Mapping[int, Marker], tracker: Tracker | None
    ) -> None:
        self.total = sum(shard.samples for shard in shards)
        self.rows = sum(marker.rows for marker in before.values())
        self.dropped = [
            (shards[number].name, key, reason) for number, marker in before.items() for key, reason in marker.dropped
        ]
        self.progress: Progress | None = None
        self._limit, self._shards, self._tracker = config.data.max_bad_fraction, shards, tracker
        self._done_before = len(before)
        self._done = self._images = 0
        self._started = time.monotonic()

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
        shards_done = self._done_before + self._done
        bad = f", {len(self.dropped):,} dropped" if self.dropped else ""
        if self.progress is not None:
            self.progress.advance(images, f"{shards_done:,} of {len(self._shards):,} shards{bad}")
        if self._tracker is not None:
            metrics = {
                "extract/samples": float(self.rows),
                "extract/dropped": float(len(self.dropped)),
                "extract/images_per_second": self._images / (time.monotonic() - self._started),
                "extract/shard_images_per_second": images / max(receipt.seconds, 1e-9),
            }
            self._tracker.log(metrics, step=shards_done, axis="shards")
        self.check_bad()

    def check_bad(self) -> None:
        """Refuse to go on with more bad samples than the config allows."""
        if len(self.dropped) > self._limit * self.total:
            named = "; ".join(f"{key} in {shard}: {reason}" for shard, key, reason in self.dropped[:NAMED])
            raise ExtractionError(
                f"{len(self.dropped):,} of {self.total:,} samples cannot be used, more than data.max_bad_fraction "
                f"({self._limit:g}) allows: {named}; mend them or raise the limit"
            )

    def summary(self, skipped: int, failed: int, seconds: float) -> ExtractionSummary:
        """The account so far."""
        rate = self._images / seconds if self._images else 0.0
        return ExtractionSummary(self._done, skipped, self.rows, len(self.dropped), failed, seconds, rate)


def _name_failures(failed: list[FailedShard], shards: int) -> str:
    named = "; ".join(f"{shard.name}: {shard.reason}" for shard in failed[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return (
        f"{len(failed)} of {shards} shards could not be done: {named}{more}. Mend them and run the same command again: "
        "the others are kept"
    )
