"""Making a damaged store such that extraction completes it."""

import sys
from pathlib import Path

from codec_dist.store import Ledger, Verification, repair_store, verify_store
from codec_dist.utils import Progress

# How many faults a message names.
NAMED = 3


def mend_store(store: str | Path, *, full: bool) -> Verification:
    """Look for damage in a store and forget the shards that have any; the caller holds the store's lease.

    What was found is told in a line on stderr. Foreign files stay, and are told of.

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
    named = "; ".join(f"{fault.where}: {fault.found}" for fault in found.faults[:NAMED])
    more = f"; and {len(found.faults) - NAMED:,} more" if len(found.faults) > NAMED else ""
    sys.stderr.write(
        f"extract: {len(found.faults):,} faults in the store {store}, {len(redo):,} shards are done again: "
        f"{named}{more}\n"
    )
    return found
