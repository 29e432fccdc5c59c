"""What a stage is: settings and inputs that decide whether it is done, files that it owns, and work."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from codec_dist.cluster_runtime import ray_session
from codec_dist.config import Config
from codec_dist.extraction import Plan
from codec_dist.models import LoadedModel
from codec_dist.pipeline.images import load_run_model, run_index
from codec_dist.pipeline.inputs import StageInputs
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.shards import ShardIndex, ShardInfo
from codec_dist.tracking import Tracker


@dataclass
class StageContext:
    """What a stage works with."""

    config: Config
    run: RunDirectory
    tracker: Tracker | None
    """Where the stage logs; None for stages that log from another process."""
    current_stages: Callable[[bool], set[str]] = field(repr=False)
    """Names of the stages whose results belong to this config and to each other; given whether shards can be read."""
    resources: contextlib.ExitStack = field(repr=False)
    """Closed after the last stage; holds the Ray session once one is needed."""
    planned: tuple[Plan, tuple[ShardInfo, ...]] | None = None
    """The extraction that was planned at the start of the run, if it was."""
    _ray_started: list[bool] = field(default_factory=list, repr=False)

    @contextlib.contextmanager
    def ray(self) -> Iterator[None]:
        """Ray for the length of a block: started or joined by the first, kept for the stages that follow."""
        if not self._ray_started:
            self.resources.enter_context(ray_session(self.config.cluster))
            self._ray_started.append(True)
        yield


class RunFacts:
    """What the settings of stages are made of; shards are listed, and the model is loaded, when first needed.

    Args:
        config: with what follows from the model's weights.
        run: the run's folder.
        index: of the run's shards, where it was read already.
    """

    def __init__(self, config: Config, run: RunDirectory, index: ShardIndex | None = None) -> None:
        self.config, self.run = config, run
        if index is not None:
            self.index = index

    @cached_property
    def index(self) -> ShardIndex:
        """The index of the run's shards."""
        return run_index(self.config)

    @cached_property
    def model(self) -> LoadedModel:
        """The run's model."""
        return load_run_model(self.config)


@dataclass(frozen=True)
class Stage:
    """One step of a run; ``codec-dist NAME CONFIG`` runs it alone."""

    name: str
    needs: tuple[str, ...]
    """Earlier stages whose results it reads."""
    settings: Callable[[RunFacts], Any]
    """The JSON value of all settings that change its result."""
    complete: Callable[[RunDirectory], bool]
    """Whether the files that later stages read are there."""
    work: Callable[[StageContext], dict[str, Any]]
    """Does it; returns a few numbers for people."""
    check: Callable[[StageInputs], None] | None = None
    """Refuses settings that the stage cannot follow: called before a run starts, and again when the stage does."""
    section: str | None = None
    """Section of the config that is about this stage alone."""
    tracked: bool = True
    """Whether the runner opens the stage's tracker (training opens its own, with the settings of its SAEs)."""

    reads_records: bool = False
    """Whether its settings include the records of other stages, which change while a command runs."""

    def is_configured(self, config: Config) -> bool:
        """Whether the config says anything about this stage, beside defaults."""
        section = None if self.section is None else getattr(config, self.section)
        return section is not None and section != type(section)()
