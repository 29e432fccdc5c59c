"""The stage: take the store, repair it, plan, coordinate, finish, sum up."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from codec_dist.cluster_runtime import ray_session
from codec_dist.config import Config
from codec_dist.extraction.agreement import Agreement
from codec_dist.extraction.calibration import calibrate
from codec_dist.extraction.completeness import Completeness
from codec_dist.extraction.coordinator import Coordinator
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan, check_free_space, make_plan
from codec_dist.extraction.scheduling import FailedShard
from codec_dist.extraction.summary import Account, ExtractionSummary
from codec_dist.shards import ShardInfo, shards_folder
from codec_dist.store import (
    ContributionStore,
    Lease,
    Ledger,
    Verification,
    finish_store,
    repair_store,
    samples_version,
    verify_store,
)
from codec_dist.tracking import Tracker
from codec_dist.utils import Progress

# How many shards, or problems, a message names.
NAMED = 3


def extract(
    config: Config,
    tracker: Tracker | None = None,
    *,
    session: Callable[[], AbstractContextManager[object]] | None = None,
    verify: bool = False,
    planned: tuple[Plan, tuple[ShardInfo, ...]] | None = None,
) -> ExtractionSummary:
    """Attribute every image of a run's shards and store the results, on Ray.

    Shards that the store holds already are not done again, except those that are damaged. Killed or
    interrupted at any moment, the same call goes on where it stopped, and the store's digest is the same.
    The store's lease is held meanwhile.

    Args:
        config: the whole config; the store is at ``store.location``, by default ``run.directory``/store.
        tracker: gets the rates as shards end, and the summary.
        session: opens Ray for the length of a block; entered only when all is checked and shards are
            pending. By default a session of this call alone, as ``config.cluster`` says.
        verify: compare all that the store holds with its checksums before; by default only names and sizes
            of its files are looked at.
        planned: what :func:`make_plan` returned for this config just before; by default it is called.

    Raises:
        LeaseError: another process extracts into this store.
        ExtractionError: shards failed (named with their reasons) or too many samples are bad, after
            everything else was done or at once; the disk is full; or the extraction cannot start.
        CodecError: what :func:`make_plan` and the cluster refuse; no actor has started then.
    """
    started = time.monotonic()
    with Lease(config.store_location) as lease:
        plan, shards = planned or make_plan(config)
        if plan.store_exists:
            mend_store(plan.store, full=verify)
        before = Ledger(plan.store).done() if plan.store_exists else {}
        pending = [number for number in range(len(shards)) if number not in before]
        agreement = _agreement_before(plan.store) if before else None
        account = Account(config.data.max_bad_fraction, shards, before, tracker, agreement, plan.expected)
        account.check_bad()
        failed: list[FailedShard] = []
        if pending:
            check_free_space(plan, [shards[number] for number in pending])
            with (
                Progress("extract", account.total, "images", done=account.rows + len(account.dropped)) as progress,
                session() if session is not None else ray_session(config.cluster),
            ):
                account.progress = progress
                calibrated, device = calibrate(plan, shards)
                failed = Coordinator(calibrated, shards, account, device, check=lease.check).run(pending)
        lease.check()
        if not failed and (pending or samples_version(plan.store) is None):
            finish_store(plan.store)
        if plan.store_exists and not failed:
            account.say_completeness(Completeness.of(ContributionStore(plan.store).sample_tables()), config)
        summary = account.summary(len(failed), time.monotonic() - started)
    if failed:
        raise ExtractionError(_name_failures(failed, len(shards)))
    if tracker is not None:
        _link_artifacts(config, plan, tracker)
    return summary


def _agreement_before(store: str) -> Agreement:
    """Labels and predictions of the shards that a store holds; one shard's table is in memory at a time."""
    agreement = Agreement()
    for table in ContributionStore(store).sample_tables():
        agreement.merge(Agreement.of(table))
    return agreement


def _link_artifacts(config: Config, plan: Plan, tracker: Tracker) -> None:
    shards, store = f"{config.run.name}-shards", f"{config.run.name}-store"
    tracker.artifact(shards, "shards", _reference(shards_folder(plan.location)))
    tracker.artifact(store, "store", _reference(plan.store), uses=[shards])


def _reference(location: str) -> Path | str:
    return location if "://" in location else Path(location)


def _name_failures(failed: list[FailedShard], shards: int) -> str:
    named = "; ".join(f"{shard.name}: {shard.reason}" for shard in failed[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return (
        f"{len(failed)} of {shards} shards could not be done: {named}{more}. Repair them and run the same command "
        "again: the others are kept"
    )


# ---- Repair: a damaged store such that extraction completes it


def mend_store(store: str | Path, *, full: bool) -> Verification:
    """Look for damage in a store and forget the shards that have any; the caller holds the store's lease.

    What was found is one line on stderr. Unexpected files stay, and are named.

    Args:
        store: folder or URL of a store that exists.
        full: read all that is stored and compare it with its checksums; otherwise names and sizes of files
            are looked at, which takes seconds and finds what is missing or cut short.

    Raises:
        StoreError: it cannot be reached or repaired.
    """
    if full:
        with Progress("verify", len(Ledger(store).done()), "shards") as progress:
            found = verify_store(store, full=True, on_shard=progress.advance)
    else:
        found = verify_store(store, full=False)
    if found.ok:
        return found
    redo = repair_store(store, found)
    named = "; ".join(f"{problem.where}: {problem.found}" for problem in found.problems[:NAMED])
    more = f"; and {len(found.problems) - NAMED:,} more" if len(found.problems) > NAMED else ""
    sys.stderr.write(
        f"extract: {len(found.problems):,} problems in the store {store}, {len(redo):,} shards are done again: "
        f"{named}{more}\n"
    )
    return found
