"""Numbers of a run: Weights & Biases (offline unless requested otherwise) and, always, RUN/metrics.jsonl beside it.

One process writes at a time: the driver of a stage.
"""

from codec_dist.tracking.errors import TrackingError
from codec_dist.tracking.journal import MetricsJournal, read_metrics
from codec_dist.tracking.tracker import Tracker
from codec_dist.tracking.wandb_environment import sweep_environment
from codec_dist.tracking.wandb_runs import RunSeries, WandbRun

__all__ = ["MetricsJournal", "RunSeries", "Tracker", "WandbRun", "TrackingError", "read_metrics", "sweep_environment"]
