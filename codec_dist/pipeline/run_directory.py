"""The folder of a run: where each stage's files are, and which stages are done."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec_dist.pipeline.errors import PipelineError
from codec_dist.utils import read_json, write_json_atomically


@dataclass(frozen=True)
class StageRecord:
    """What is kept of a finished stage."""

    stage: str
    fingerprint: str
    """Hash of the stage's own settings and of its inputs' fingerprints."""
    seconds: float
    """Wall time of the last invocation that finished the stage."""
    summary: dict[str, Any]
    """A few numbers for people."""


class RunDirectory:
    """Where a run's files are, and the records of its finished stages.

    Args:
        directory: the run's folder.
        store: folder or URL of its store; default: ``store`` in the run's folder.

    Raises:
        PipelineError: the folder is a URL or a file.
    """

    def __init__(self, directory: str | Path, store: str | None = None) -> None:
        if "://" in str(directory):
            raise PipelineError(
                f"run.directory {directory} is a URL: a run is a folder, only its store may be at a URL; "
                "give a folder, and the URL as store.location"
            )
        self.path = Path(directory)
        if self.path.exists() and not self.path.is_dir():
            raise PipelineError(f"run.directory {self.path} is a file: choose another folder")
        self.config = self.path / "config.yaml"
        self.split = self.path / "split.parquet"
        self.index_cache = self.path / "index"
        self.store = store or str(self.path / "store")
        self.sae = self.path / "sae"
        self.modes = self.path / "modes"
        self.interventions = self.path / "interventions"
        self.figures = self.path / "figures"
        self.report = self.path / "report" / "index.html"
        self._records = self.path / "stages"

    def record(self, stage: str) -> StageRecord | None:
        """The record of a finished stage, or None."""
        path = self._records / f"{stage}.json"
        if not path.exists():
            return None
        try:
            return StageRecord(**read_json(path))
        except (ValueError, TypeError):
            # A record that cannot be read says nothing about the stage: it runs again.
            return None

    def finish(self, stage: str, fingerprint: str, started: float, summary: dict[str, Any]) -> StageRecord:
        """Record a stage as finished; ``started`` is from ``time.monotonic()``."""
        record = StageRecord(stage, fingerprint, round(time.monotonic() - started, 3), summary)
        write_json_atomically(self._records / f"{stage}.json", record.__dict__)
        return record

    def forget(self, stage: str) -> None:
        """Remove a stage's record before its files change."""
        (self._records / f"{stage}.json").unlink(missing_ok=True)
