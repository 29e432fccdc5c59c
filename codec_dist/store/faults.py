"""What verification found, for people and for the repair."""

from dataclasses import dataclass

SHOWN_FAULTS = 40


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a store."""

    kind: str
    """``chunk``, ``samples`` (table of a shard), ``marker``, ``metadata`` (of arrays), ``table`` (of all samples),
    ``leftover`` (of a process that was killed), or ``foreign`` (no file of this store)."""
    file: str
    """The file, relative to the store."""
    found: str
    """What is wrong with it."""
    shard_number: int | None = None
    shard: str = ""
    """File name of the shard."""
    layer: str = ""
    quantity: str = ""

    @property
    def redo(self) -> bool:
        """Whether the shard must be extracted again."""
        return self.kind in ("chunk", "samples", "marker")

    @property
    def where(self) -> str:
        """Shard, layer and quantity, as far as the fault has them; else the file."""
        parts = [self.shard, self.layer, self.quantity]
        return "  ".join(part for part in parts if part) or self.file


@dataclass(frozen=True)
class Verification:
    """What a look at a store has shown."""

    location: str
    full: bool
    """Whether all was read; else only names and sizes of files were looked at."""
    shards: int
    shards_done: int
    """Shards with a marker of this store."""
    chunks: int
    """Chunks that were looked at."""
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. Shards that are pending are not wrong."""
        return not self.faults

    @property
    def damaged(self) -> list[int]:
        """Numbers of the shards that must be extracted again, in order."""
        return sorted({fault.shard_number for fault in self.faults if fault.redo and fault.shard_number is not None})

    def __str__(self) -> str:
        how = "read and compared with the markers" if self.full else "looked up by name and size, not read"
        pending = self.shards - self.shards_done
        lines = [
            f"{'store':<10}{self.location}",
            f"{'shards':<10}{self.shards_done:,} of {self.shards:,} done" + (f", {pending:,} pending" * bool(pending)),
            f"{'chunks':<10}{self.chunks:,} {how}",
            f"{'faults':<10}{len(self.faults):,}" if self.faults else f"{'faults':<10}none",
        ]
        shown = self.faults[:SHOWN_FAULTS]
        kinds, places = max([len(f.kind) for f in shown], default=0), max([len(f.where) for f in shown], default=0)
        lines += [f"  {fault.kind:<{kinds}}  {fault.where:<{places}}  {fault.found}" for fault in shown]
        if len(self.faults) > SHOWN_FAULTS:
            lines.append(f"  and {len(self.faults) - SHOWN_FAULTS:,} more")
        return "\n".join(lines + self._advice())

    def _advice(self) -> list[str]:
        if self.ok:
            return []
        advice = []
        if any(fault.kind != "foreign" for fault in self.faults):
            advice.append(f"run `codec-dist store verify --repair {self.location}`")
        if self.damaged:
            several = "s are" if len(self.damaged) > 1 else " is"
            advice.append(f"then `codec-dist extract`: {len(self.damaged):,} shard{several} done again")
        if any(fault.kind == "foreign" for fault in self.faults):
            advice.append("move foreign files out of the store")
        return ["to do     " + "; ".join(advice)]
