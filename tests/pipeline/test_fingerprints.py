"""Whether stages are done is found out with as few looks at shards and model as there are stages."""

from collections import Counter
from pathlib import Path

import pytest

from codec_dist.config import Config
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.fingerprints import StageFingerprints
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.pipeline.stage import RunFacts, Stage

NEEDS = {"first": (), "second": ("first",), "third": ("first", "second"), "last": ()}


class _Run:
    """Four stages that count how often their settings are looked up."""

    def __init__(self, folder: Path) -> None:
        self.looks: Counter[str] = Counter()
        self.directory = RunDirectory(folder)
        sections = {"run": {"directory": str(folder)}, "data": {"shards": str(folder)}, "model": {"spec": "timm:none"}}
        config = Config.model_validate(sections)
        self.facts = RunFacts(config, self.directory)
        self.stages = [
            Stage(name, needs, self._settings(name), lambda run: True, lambda context: {}, reads_records=name == "last")
            for name, needs in NEEDS.items()
        ]
        self.settings = dict.fromkeys(NEEDS, 0)

    def _settings(self, name: str):
        def look(facts: RunFacts) -> int:
            self.looks[name] += 1
            return self.settings[name]

        return look

    def command(self) -> StageFingerprints:
        return StageFingerprints(self.facts, self.stages)

    def finish(self) -> None:
        fingerprints = self.command()
        for name in NEEDS:
            self.directory.finish(name, fingerprints.of(name), 0.0, {})
        self.looks.clear()


def test_settings_of_a_finished_run_are_looked_up_once_per_command(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.finish()
    fingerprints = run.command()
    for _ in range(3):
        assert fingerprints.current_stages() == set(NEEDS)
        assert all(fingerprints.is_current(name) for name in NEEDS)
    assert run.looks == {"first": 1, "second": 1, "third": 1, "last": 6}


@pytest.mark.parametrize(
    ("changed", "current"),
    [("first", {"last"}), ("second", {"first", "last"}), ("third", {"first", "second", "last"})],
)
def test_stages_after_one_with_other_settings_are_not_current(tmp_path: Path, changed: str, current: set[str]) -> None:
    run = _Run(tmp_path)
    run.finish()
    run.settings[changed] = 1
    assert run.command().current_stages() == current


def test_a_stage_whose_inputs_were_made_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    with pytest.raises(PipelineError, match="`third` needs `first` first"):
        run.command().of("third")
    run.finish()
    run.settings["second"] = 1
    with pytest.raises(PipelineError, match="`second` was run with other settings"):
        run.command().of("third")


def test_records_that_change_amid_a_command_are_seen(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.finish()
    fingerprints = run.command()
    assert fingerprints.is_current("third")
    run.directory.forget("second")
    with pytest.raises(PipelineError, match="`third` needs `second` first"):
        fingerprints.of("third")
