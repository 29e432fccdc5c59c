"""What every rank is told."""

from dataclasses import dataclass
from pathlib import Path

from codec_dist.config import TrackingSection
from codec_dist.training.rows import STREAMED_WINDOW_BYTES
from codec_dist.training.sae_jobs import SaeJob


@dataclass(frozen=True)
class TrainingTask:
    """The SAEs to train and where things are; the same on every rank."""

    directory: Path
    """The run; SAEs go to ``directory/sae``."""
    store_path: str | Path
    """Folder or URL of the store."""
    split_path: Path
    jobs: tuple[SaeJob, ...]
    """All SAEs that are asked for, finished ones among them."""
    name: str
    """Name of the run, under which the tracker groups."""
    seed: int
    evaluations: int
    checkpoints: int
    tracking: TrackingSection
    correlation_threshold: float = 0.2
    dtype: str = "float32"
    """Type of rows and weights."""
    threads: int = 1
    """CPU threads of each rank."""
    spread: bool = False
    """Whether each rank trains whole layers and quantities by itself, in place of shares of every batch."""
    bytes_for_rows: int | None = None
    """Memory that each rank may fill with rows; None: measured."""
    window_bytes: int = STREAMED_WINDOW_BYTES
    """Memory of one window of rows that do not fit."""

    def folder(self, job: SaeJob) -> Path:
        """Where an SAE is saved."""
        return self.directory / "sae" / job.folder

    @property
    def scratch(self) -> Path:
        """Files that live only while the training runs."""
        return self.directory / "sae" / ".train"
