"""What stages find when they start: as earlier stages left it, or, before a run, as its config will make it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq

from codec_dist.config import Config
from codec_dist.extraction import Plan
from codec_dist.pipeline.images import run_index
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.pipeline.selected_saes import selected_saes
from codec_dist.shards import configured_split
from codec_dist.store import ContributionStore, stored_quantities
from codec_dist.training import check_training, read_left_out


@dataclass(frozen=True)
class StageInputs:
    """What the check of a stage may look at; the same before a run and at the start of the stage."""

    config: Config
    layers: Mapping[str, int]
    """Layer key → channels, of the store."""
    quantities: tuple[str, ...]
    """Names of the stored quantities."""
    selected: Mapping[str, Collection[str]] | None = None
    """Layer key → quantities with an SAE that later stages use; None: training is yet to come."""
    split: Path | None = None
    """The run's split.parquet; None: it is not written yet, or is another config's."""
    left_out: frozenset[tuple[str, str]] = frozenset()
    """Layers and quantities whose SAEs could not be trained."""

    @cached_property
    def saes(self) -> Mapping[str, Collection[str]]:
        """Layer key → quantities that have an SAE, or will have one as the config says.

        Raises:
            TrainingError, SaeError: the config asks for SAEs that cannot be trained.
        """
        if self.selected is not None:
            return self.selected
        return check_training(self.layers, self.quantities, self.config.sae.groups, self.config.sae.spread)

    @cached_property
    def parts(self) -> Mapping[str, int]:
        """Number of samples in each part of the split."""
        if self.split is not None:
            table = pq.read_table(self.split, columns=["part"])
        else:
            table = configured_split(self.config, run_index(self.config).samples())
        counts = table["part"].value_counts().to_pylist()
        return {str(count["values"]): int(count["counts"]) for count in counts}


def planned_inputs(config: Config, plan: Plan, split: Path | None) -> StageInputs:
    """What later stages will find once the extraction has done as planned."""
    return StageInputs(config, plan.layers, tuple(stored_quantities(plan.quantities, plan.targets)), split=split)


def present_inputs(config: Config, run: RunDirectory, split: Path | None, *, trained: bool) -> StageInputs:
    """What is there now: a store and, where ``trained``, the choice among its SAEs.

    Raises:
        StoreError: a store that cannot be read.
    """
    store = ContributionStore(run.store)
    left_out = frozenset((item.layer, item.quantity) for item in read_left_out(run.sae)) if trained else frozenset()
    selected = selected_saes(run) if trained else None
    return StageInputs(config, store.layers, store.quantities, selected, split, left_out)
