"""Small stores for the tests of this package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from codec_dist.store import BlockWriter, Marker, create_store

SIGN = {"positive": 1, "negative": -1}


@dataclass
class Plan:
    """A store and the numbers that belong into it, drawn from a seed per shard."""

    path: Path
    layers: Mapping[str, int] = field(default_factory=lambda: {"blocks.0": 3, "blocks.1@input:heads": 5})
    targets: Sequence[str] = ("top_1",)
    quantities: Sequence[str] = ("contribution-positive", "contribution-negative", "activation-positive")
    shards: Sequence[tuple[str, int]] = (("s-0.tar", 4), ("s-1.tar", 6), ("s-2.tar", 1))
    dtype: str = "float32"
    dropped: Mapping[int, int] = field(default_factory=dict)
    """Shard number → how many of its last samples are dropped."""
    identity: Mapping[str, Any] = field(default_factory=lambda: {"model": "m", "method": {"steps": 10}})

    def create(self, **changes: Any) -> None:
        arguments = {
            name: getattr(self, name) for name in ("identity", "layers", "targets", "quantities", "shards", "dtype")
        }
        create_store(self.path, **arguments | changes)

    def rows(self, number: int) -> int:
        return self.shards[number][1] - self.dropped.get(number, 0)

    def names(self) -> list[str]:
        """Quantity names as they are written: contributions of later targets are bracketed."""
        names = []
        for quantity in self.quantities:
            kind, sign = quantity.split("-")
            more = self.targets[1:] if kind == "contribution" else ()
            names += [quantity, *(f"{kind}[{target}]-{sign}" for target in more)]
        return names

    def values(self, number: int) -> dict[tuple[str, str], np.ndarray]:
        random = np.random.default_rng(number)
        return {
            (layer, name): (random.random((self.rows(number), channels)) * SIGN[name.rsplit("-")[-1]]).astype(
                self.dtype
            )
            for layer, channels in self.layers.items()
            for name in self.names()
        }

    def samples(self, number: int) -> pa.Table:
        rows = self.rows(number)
        return pa.table(
            {
                "key": [f"key-{number}-{position}" for position in range(rows)],
                "label": pa.array([position % 3 or None for position in range(rows)], pa.int32()),
                "prediction": pa.array(range(rows), pa.int64()),
                "target_value": np.arange(rows) / 7,
                "baseline_value": np.full(rows, 0.25),
                "completeness.blocks.0": np.full(rows, number, np.float32),
            }
        )

    def write(self, number: int, **changes: Any) -> Marker:
        lost = range(self.rows(number), self.shards[number][1])
        dropped = [(f"key-{number}-{position}", "no image") for position in lost]
        arguments = {"values": self.values(number), "samples": self.samples(number), "dropped": dropped} | changes
        return BlockWriter(self.path).write(number, **arguments)

    def expected(self, layer: str, name: str, numbers: Sequence[int] | None = None) -> np.ndarray:
        numbers = range(len(self.shards)) if numbers is None else numbers
        return np.concatenate([self.values(number)[layer, name] for number in numbers])


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A store that is made, with nothing written."""
    plan = Plan(tmp_path / "store")
    plan.create()
    return plan


@pytest.fixture
def full(plan: Plan) -> Plan:
    """A store in which every shard is written."""
    for number in range(len(plan.shards)):
        plan.write(number)
    return plan


@pytest.fixture(scope="session")
def make_plan() -> type[Plan]:
    return Plan
