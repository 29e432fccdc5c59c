"""Which SAEs a config asks for, what each is called, and which already exist."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from codec_dist.config import SaeGroup, TrainingSettings
from codec_dist.store import ContributionStore
from codec_dist.training.errors import TrainingError
from codec_dist.utils import derive_seed, escape_name, hash_json, suggestion

FORMAT = 1
HASH_DIGITS = 12


@dataclass(frozen=True, eq=False)
class SaeJob:
    """One SAE to train: everything that its weights depend on, except the rows themselves."""

    layer: str
    quantity: str
    channels: int
    architecture: str
    options: Mapping[str, Any]
    settings: TrainingSettings
    seed: int
    digest: str
    """Hash of architecture, settings, layer, quantity, the store's identity and the split."""

    @property
    def key(self) -> tuple[str, str]:
        """Layer and quantity: the rows that the SAE decomposes."""
        return self.layer, self.quantity

    @property
    def folder(self) -> Path:
        """Where the SAE lives, relative to the run's ``sae`` folder."""
        identity = f"{self.digest[:HASH_DIGITS]}-s{self.seed}"
        return Path(escape_name(self.layer), escape_name(self.quantity), identity)

    @property
    def label(self) -> str:
        """Its name in logs."""
        return f"{self.layer}/{self.quantity}/{self.architecture}"

    def derived_seed(self, *purpose: int | str) -> int:
        """A seed for one purpose that no other SAE or purpose shares."""
        return derive_seed(self.seed, self.digest, *purpose)


def plan_jobs(store: ContributionStore, groups: Sequence[SaeGroup], split_hash: str, seed: int) -> list[SaeJob]:
    """The SAEs of all groups, in the order of groups, layers and quantities; none twice.

    Raises:
        TrainingError: a layer or quantity (or glob over them) that the store does not hold.
    """
    jobs: dict[str, SaeJob] = {}
    stored = list(store.quantities)
    for group in groups:
        layers = _matching("layers", group.layers, list(store.layers))
        quantities = _matching("quantities", group.quantities, stored, _net_quantities(stored))
        for layer in layers:
            for quantity in quantities:
                job = _job(store, group, layer, quantity, split_hash, seed)
                jobs.setdefault(job.digest, job)
    return list(jobs.values())


def is_finished(folder: Path) -> bool:
    """Whether an SAE was trained to its end; the metrics are written last."""
    return (folder / "metrics.json").is_file()


def _job(store: ContributionStore, group: SaeGroup, layer: str, quantity: str, split_hash: str, seed: int) -> SaeJob:
    asked = {
        "format": FORMAT,
        "architecture": group.architecture.model_dump(mode="json"),
        "training": group.training.model_dump(mode="json"),
        "layer": layer,
        "quantity": quantity,
        "data": store.identity_hash,
        "rows": {marker.shard: marker.rows for marker in store.markers.values()},
        "split": split_hash,
    }
    return SaeJob(
        layer=layer,
        quantity=quantity,
        channels=store.layers[layer],
        architecture=group.architecture.name,
        options=group.architecture.options,
        settings=group.training,
        seed=seed,
        digest=hash_json(asked),
    )


def _net_quantities(stored: Sequence[str]) -> list[str]:
    """The net quantities that a store derives where it holds both signs; only exact names ask for them."""
    kinds = [name.removesuffix("-positive") for name in stored if name.endswith("-positive")]
    return [f"{kind}-net" for kind in kinds if f"{kind}-negative" in stored]


def _matching(field: str, patterns: Sequence[str], stored: Sequence[str], derived: Sequence[str] = ()) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        # An exact name first, because names may hold the brackets that globs use.
        known = [*stored, *derived]
        found = [pattern] if pattern in known else [name for name in stored if fnmatchcase(name, pattern)]
        if not found:
            raise TrainingError(f"sae.groups.{field}: the store holds no {pattern!r}; {suggestion(pattern, known)}")
        names += found
    return list(dict.fromkeys(names))
