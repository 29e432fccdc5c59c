"""Whether stages are done: hashes of their settings and inputs, each computed once per command."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.stage import RunFacts, Stage
from codec_dist.utils import CodecError, hash_json


class StageFingerprints:
    """Fingerprints of a run's stages: hashes of each one's own settings and of its inputs' fingerprints.

    Args:
        facts: what settings are made of; they must not change while this object is used.
        stages: all stages in the order of the flow.
    """

    def __init__(self, facts: RunFacts, stages: Sequence[Stage]) -> None:
        self._facts, self._stages = facts, {stage.name: stage for stage in stages}
        self._known: dict[str, str] = {}

    def of(self, name: str) -> str:
        """A stage's fingerprint.

        Raises:
            PipelineError: a stage that it needs was not run, or was run for other settings.
        """
        stage = self._stages[name]
        inputs = {need: self._input(need, name) for need in stage.needs}
        if stage.reads_records:
            return self._hash(stage, inputs)
        if name not in self._known:
            self._known[name] = self._hash(stage, inputs)
        return self._known[name]

    def is_current(self, name: str) -> bool:
        """Whether a stage was done for these settings.

        Raises:
            PipelineError: a stage that it needs was not.
        """
        record = self._facts.run.record(name)
        return record is not None and record.fingerprint == self.of(name)

    def current_stages(self, readable: bool = True) -> set[str]:
        """The stages whose results belong to this config and to each other.

        Where the shards are not ``readable``, nothing speaks against the stages that are there.
        """
        current: set[str] = set()
        for name, stage in self._stages.items():
            if self._facts.run.record(name) is None or not current.issuperset(stage.needs):
                continue
            try:
                belongs = not readable or self.is_current(name)
            except CodecError:
                # Data or model are out of reach, as where a run is only looked at: nothing speaks against its files.
                belongs = True
            if belongs:
                current.add(name)
        return current

    def _input(self, need: str, name: str) -> str:
        """The fingerprint in the record of an earlier stage, which must be that of its settings now."""
        record = self._facts.run.record(need)
        # The first stage has no command of its own: `extract` includes it.
        config = shlex.quote(str(self._facts.run.config))
        command = f"codec-dist {'extract' if need == 'prepare' else need} {config}"
        if record is None:
            raise PipelineError(f"`{name}` needs `{need}` first: run `{command}`")
        if record.fingerprint != self.of(need):
            raise PipelineError(f"`{need}` was run with other settings than this config's: run `{command}` again")
        return record.fingerprint

    def _hash(self, stage: Stage, inputs: Mapping[str, Any]) -> str:
        return hash_json({"stage": stage.name, "settings": stage.settings(self._facts), "inputs": dict(inputs)})
