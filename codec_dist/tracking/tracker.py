"""What stages log through."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from codec_dist.config import TrackingSection
from codec_dist.tracking.errors import TrackingError
from codec_dist.tracking.journal import MetricsJournal
from codec_dist.tracking.wandb_runs import FAILED, FINISHED, INTERRUPTED, WandbRun, outcome_of
from codec_dist.utils import values_without_credentials, without_credentials

MOST_BINS = 512
MOST_ROWS = 10_000
EVENTS = {FINISHED: "end", FAILED: "failed", INTERRUPTED: "interrupted"}

Cell = str | float | int | bool | Path | None


class Tracker:
    """Logs one stage of a run to W&B and to RUN/metrics.jsonl. Use it as a context manager::

        with Tracker(run, config.tracking, stage="train", group="digits", config=settings) as tracker:
            tracker.log({"train/loss": 0.3}, step=5, axis="epoch")

    W&B gets one run per tracker, whose job type is the stage and whose group is the experiment. In the
    mode ``offline`` nothing touches the network; in ``disabled`` only metrics.jsonl is written.

    Args:
        directory: the run's folder; W&B's files go to its ``wandb`` folder.
        section: mode, project, entity and tags.
        stage: what this process does, e.g. ``extract``.
        group: what the stages of one experiment share.
        config: settings shown with the W&B run.

    Raises:
        TrackingError: on entry: ``online`` without credentials, or a folder that cannot be written.
    """

    def __init__(
        self, directory: Path, section: TrackingSection, *, stage: str, group: str, config: Mapping[str, Any]
    ) -> None:
        self._directory, self._section = Path(directory), section
        self._stage, self._group, self._config = stage, without_credentials(group), dict(config)
        self._journal: MetricsJournal | None = None
        self._wandb: WandbRun | None = None

    def __enter__(self) -> Self:
        journal = MetricsJournal(self._directory / "metrics.jsonl")
        try:
            if self._section.mode != "disabled":
                self._wandb = WandbRun(self._directory, self._section, self._stage, self._group, self._config)
        except BaseException:
            journal.close()
            raise
        self._journal = journal
        self._write({"event": "start", "group": self._group})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = outcome_of(kind)
        try:
            self._write({"event": EVENTS[outcome]})
        finally:
            if self._wandb is not None:
                self._wandb.finish(outcome)
                self._wandb = None
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def log(
        self, metrics: Mapping[str, float], *, step: int | None = None, axis: str = "step", journal_only: bool = False
    ) -> None:
        """Log numbers at a point of an axis: ``axis`` names it (``epoch``, ``shard``), ``step`` is the point.

        Steps need not grow from call to call, so several series may follow one another. Keep names few
        (W&B takes 10,000 per project): none per channel or mode. With ``journal_only`` they go to
        metrics.jsonl alone, for what gets a W&B run of its own.
        """
        self._write({"axis": axis, "step": step, "metrics": dict(metrics)})
        if self._wandb is not None and not journal_only:
            self._wandb.log(_numbers(metrics), step, axis)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Set the stage's final numbers."""
        self._write({"summary": dict(metrics)})
        if self._wandb is not None:
            self._wandb.summary(_numbers(metrics))

    def histogram(
        self,
        name: str,
        values: ArrayLike,
        bins: int = 64,
        *,
        step: int | None = None,
        axis: str = "step",
        journal_only: bool = False,
    ) -> None:
        """Log the distribution of ``values`` [any shape] in at most 512 bins; values not finite are left out.

        Args:
            name: as for :meth:`log`.
            values: numbers.
            bins: of equal width between the smallest and the largest value.
            step: as for :meth:`log`.
            axis: as for :meth:`log`.
            journal_only: as for :meth:`log`.

        Raises:
            TrackingError: fewer than 1 bin or more than 512.
        """
        if not 1 <= bins <= MOST_BINS:
            raise TrackingError(f"histogram {name!r}: {bins} bins requested, 1 to {MOST_BINS} are possible")
        numbers = np.asarray(values, dtype=np.float64).ravel()
        numbers = numbers[np.isfinite(numbers)]
        counts, edges = np.histogram(numbers, bins=bins)
        record = {"name": name, "counts": counts.tolist(), "edges": edges.tolist()}
        self._write({"axis": axis, "step": step, "histogram": record})
        if self._wandb is not None and len(numbers) and not journal_only:
            self._wandb.histogram(name, counts, edges, step, axis)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Log a table; cells are numbers, strings, null, or the path of a PNG, which is shown as an image.

        Only the first 10,000 rows are kept; the number left out is logged beside.

        Raises:
            TrackingError: a row of another length than ``columns``, or an image that is not there.
        """
        for number, row in enumerate(rows):
            if len(row) != len(columns):
                raise TrackingError(f"table {name!r}: row {number} has {len(row)} cells for {len(columns)} columns")
            for cell in row:
                if isinstance(cell, Path) and not cell.is_file():
                    raise TrackingError(f"table {name!r}: row {number} shows {cell}, which does not exist")
        kept, left_out = [list(row) for row in rows[:MOST_ROWS]], max(len(rows) - MOST_ROWS, 0)
        shown = [[self._relative(cell) for cell in row] for row in kept]
        record = {"name": name, "columns": list(columns), "rows": shown, "rows_left_out": left_out}
        self._write({"table": record})
        if self._wandb is not None:
            self._wandb.table(name, list(columns), kept)
            if left_out:
                self._wandb.summary({f"{name}/rows_left_out": left_out})

    def artifact(self, name: str, kind: str, path_or_reference: Path | str, uses: Sequence[str] = ()) -> None:
        """Log that this stage made something, without copying it.

        Args:
            name: its name, by which later stages refer to it.
            kind: what it is: ``shards``, ``store``, ``sae``, ``summary``.
            path_or_reference: a local file or folder, or a URL.
            uses: names of the artifacts, logged by this run before, from which it was made.

        Raises:
            TrackingError: a local path that does not exist.
        """
        location, name, uses = str(path_or_reference), without_credentials(name), values_without_credentials(uses)
        if "://" not in location and not Path(location).exists():
            raise TrackingError(f"artifact {name!r}: there is no file or folder {location}")
        if self._wandb is not None:
            self._wandb.artifact(name, kind, location, uses)
        record = {"name": name, "kind": kind, "location": self._relative(path_or_reference), "uses": list(uses)}
        self._write({"artifact": record})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._journal is None:
            raise TrackingError(f"the tracker of stage {self._stage!r} is not open: use it in a `with` statement")
        self._journal.write({"stage": self._stage, **entry})

    def _relative(self, cell: Any) -> Any:
        """Paths as text, those inside the run relative to it, so that the run can be moved."""
        if not isinstance(cell, Path):
            return cell
        inside = cell.resolve().is_relative_to(self._directory.resolve())
        return str(cell.resolve().relative_to(self._directory.resolve())) if inside else str(cell)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy and torch scalars as plain ones."""
    return {
        name: value.item() if hasattr(value, "item") and callable(value.item) else value
        for name, value in metrics.items()
    }
