"""The microbatch of a store: as the config says, or chosen once from the memory that an actor may use."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from codec_dist.cluster_runtime import MemoryShare, memory_shares
from codec_dist.extraction.errors import ExtractionError
from codec_dist.extraction.plan import Plan
from codec_dist.extraction.sizing import ActorNeeds


def resolve_microbatch(plan: Plan, settings: Mapping[str, Any] | None, device: str) -> tuple[Plan, dict[str, Any]]:
    """Resolve ``attribution.microbatch: auto``; needs an open Ray session.

    A store that exists keeps its number, on which the last bits of its numbers depend; a line says so where that is
    more than fits now.

    Args:
        plan: with the needs of an actor.
        settings: those of the store; None: it is not made yet.
        device: ``cuda`` or ``cpu``.

    Returns:
        The plan with the number, and what is to be noted in a store that is made.

    Raises:
        ExtractionError: the store does not say its number.
    """
    if plan.config.attribution.microbatch != "auto":
        return plan, {}
    needs, shares = plan.needs[device], memory_shares(plan.config.cluster, device)
    fits = choose_microbatch(needs, shares)
    if settings is None:
        sys.stderr.write(f"extract: microbatch {fits} chosen: {describe_needs(needs, shares, fits)}\n")
        return replace(plan, microbatch=fits), {"microbatch": fits}
    stored = settings.get("microbatch")
    if isinstance(stored, bool) or not isinstance(stored, int) or stored < 1:
        raise ExtractionError(
            f"the store {plan.store} was made with attribution.microbatch auto, but does not say which number that was "
            f"({stored!r}): remove the store, or restore it from a copy"
        )
    if stored > fits:
        sys.stderr.write(
            f"extract: the store {plan.store} was begun with a microbatch of {stored}, which it keeps, and which is "
            f"more than fits: {describe_needs(needs, shares, stored)}; if actors are killed for memory, lower "
            "cluster.actors\n"
        )
    return replace(plan, microbatch=stored), {}


def choose_microbatch(needs: ActorNeeds, shares: Sequence[MemoryShare]) -> int:
    """The largest microbatch that fits on every machine; 1 where none does. Without any machine: as if there were
    memory enough, since nothing is known.
    """
    affordable = [needs.host.largest(share.host_bytes) for share in shares]
    if needs.device is not None:
        affordable += [needs.device.largest(share.device_bytes) for share in shares if share.device_bytes is not None]
    return min(affordable, default=needs.host.largest(sys.maxsize))


def describe_needs(needs: ActorNeeds, shares: Sequence[MemoryShare], microbatch: int) -> str:
    """What an actor takes with a microbatch, and what it may use where that is least."""
    words = [_compare(needs.host.bytes(microbatch), min(shares, key=lambda share: share.host_bytes, default=None))]
    devices = [share.device_bytes for share in shares if share.device_bytes is not None]
    if needs.device is not None and devices:
        words.append(f"{_gb(needs.device.bytes(microbatch))} of its GPU's {_gb(min(devices))}")
    return ", ".join(words)


def _compare(needed: int, share: MemoryShare | None) -> str:
    taken = f"an actor takes about {_gb(needed)}"
    if share is None:
        return taken
    beside = f"{share.actors} actors" if share.actors > 1 else "one actor"
    more = "" if needed <= share.host_bytes else ": lower cluster.actors, or choose fewer layers"
    return f"{taken}, and may use {_gb(share.host_bytes)} on {share.node} ({beside} there){more}"


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
