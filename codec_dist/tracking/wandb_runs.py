"""One W&B run: started without questions, written without surprises, finished with its file complete."""

import netrc
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from codec_dist.config import TrackingSection
from codec_dist.tracking.errors import TrackingError
from codec_dist.tracking.journal import finite, read_metrics
from codec_dist.tracking.wandb_environment import SWEEP_STAGE, generate_id, sweep_environment, wandb_environment
from codec_dist.utils import environment, identifier, naming_full_disk, without_credentials

LONGEST_TITLE = 128
LEAST_FREE_BYTES = 64 * 1024
"""Where less is left, W&B, which does not say so itself, may not have written all of a file."""
MOST_REFERENCES = 1000
MOST_BYTES_TO_HASH = 64 * 1024

# Exit codes that W&B knows a run's end by; the last is its own for Ctrl-C.
FINISHED, FAILED, INTERRUPTED = 0, 1, 255

_open_runs = 0
_lock = threading.Lock()


class WandbRun:
    """A W&B run inside RUN/wandb. The arguments are those of :class:`codec_dist.tracking.Tracker`."""

    def __init__(
        self,
        directory: Path,
        section: TrackingSection,
        stage: str,
        group: str,
        config: Mapping[str, Any],
        name: str | None = None,
    ) -> None:
        self._directory = directory
        self._offline = section.mode == "offline"
        self._axes: set[str] = set()
        self._defined: set[str] = set()
        self._cleanup = ExitStack()
        try:
            with naming_full_disk(directory / "wandb"):
                (directory / "wandb").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"cannot write to {directory / 'wandb'}: {error.strerror or error}") from error
        try:
            in_sweep = stage == SWEEP_STAGE and name is None and bool(sweep_environment())
            self._cleanup.enter_context(environment(wandb_environment(directory, section, in_sweep=in_sweep)))
            # In a sweep, W&B takes these from the environment alone.
            own = {"project": section.project, "entity": section.entity, "id": generate_id()}
            place: dict[str, Any] = {} if in_sweep else own
            self._run = self._start(section, stage, group, config, name or f"{group}-{stage}", place)
        except BaseException:
            self._cleanup.close()
            raise

    def _start(
        self,
        section: TrackingSection,
        stage: str,
        group: str,
        config: Mapping[str, Any],
        name: str,
        place: Mapping[str, Any],
    ) -> Any:
        import wandb

        if not self._offline:
            _check_credentials()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_save_requirements=False,
            # Metadata hold the words of the command line.
            # Offline, the machine's name and statistics are nobody's business, and asking for them takes time.
            x_disable_meta=self._offline or any(word != without_credentials(word) for word in sys.argv),
            x_disable_machine_info=self._offline,
            x_disable_stats=self._offline,
        )
        try:
            with _own_service():
                run = wandb.init(
                    **place,
                    dir=str(self._directory),
                    group=identifier(group),
                    job_type=stage,
                    name=name if len(name) <= LONGEST_TITLE else name[: LONGEST_TITLE - 1] + "…",
                    tags=list(section.tags),
                    config=finite(config),
                    mode=section.mode,
                    settings=settings,
                    reinit="create_new",
                )
        except (wandb.Error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise TrackingError(f"W&B refused to start a run ({reason}): try `--tracking.mode offline`") from error
        _keep_service()
        return run

    @property
    def file(self) -> Path:
        """Where an offline run is kept."""
        return Path(self._run.settings.sync_file)

    def log(self, values: Mapping[str, Any], step: int | None, axis: str) -> None:
        """Log values at a point of an axis, without W&B's own counter, which could only grow."""
        if step is None:
            self._run.log(dict(values))
            return
        if axis not in self._axes:
            self._run.define_metric(_definition(axis), hidden=True)
            self._axes.add(axis)
        for name in values.keys() - self._defined:
            self._run.define_metric(_definition(name), step_metric=axis)
            self._defined.add(name)
        self._run.log({axis: step, **values})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def histogram(self, name: str, counts: np.ndarray, edges: np.ndarray, step: int | None, axis: str) -> None:
        import wandb

        self.log({name: wandb.Histogram(np_histogram=(counts, edges))}, step, axis)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        # W&B wants one type per column; null may stand in any.
        columns_of_cells = [
            _one_type([row[at] if isinstance(row[at], Path) else finite(row[at]) for row in rows])
            for at in range(len(columns))
        ]
        shown = [
            [wandb.Image(str(cell)) if isinstance(cell, Path) else cell for cell in row]
            for row in zip(*columns_of_cells, strict=True)
        ]
        self._run.log({name: wandb.Table(columns=columns, data=shown)})

    def artifact(self, name: str, kind: str, location: str, uses: Sequence[str]) -> None:
        known = {
            entry["artifact"]["name"]: entry["artifact"]
            for entry in read_metrics(self._directory / "metrics.jsonl")
            if "artifact" in entry
        }
        for used in filter(known.__contains__, uses):
            source = str(known[used]["location"])
            where = source if "://" in source else str(self._directory / source)
            # Offline, W&B takes no inputs: there the metadata of the artifact say what it was made from.
            if not self._offline and ("://" in where or Path(where).exists()):
                # An artifact of the same content is the same version: W&B draws the line between the stages.
                self._run.use_artifact(self._reference(used, known[used]["kind"], where, ()))
        self._run.log_artifact(self._reference(name, kind, location, uses))

    def finish(self, outcome: int) -> None:
        """End the run; on return an offline run's file is complete, unless another run is still open.

        Args:
            outcome: of :func:`outcome_of`.
        """
        path = self.file
        try:
            try:
                self._run.finish(exit_code=outcome)
            finally:
                ended = _release_service()
            if ended and self._offline:
                _check_complete(path)
        except Exception:
            # Whatever ended the stage is the error to show; it may have ended W&B's process, too.
            if outcome == FINISHED:
                raise
        finally:
            self._cleanup.close()

    def _reference(self, name: str, kind: str, location: str, uses: Sequence[str]) -> Any:
        import wandb

        metadata = {"location": without_credentials(location), "uses": list(uses)}
        artifact = wandb.Artifact(identifier(name), identifier(kind), metadata=metadata)
        if "://" in location:
            with artifact.new_file("location.txt") as file:
                file.write(without_credentials(location) + "\n")
            return artifact
        root = Path(location).resolve()
        files = list(islice(_files(root), MOST_REFERENCES + 1))
        artifact.metadata["all_files_referenced"] = len(files) <= MOST_REFERENCES
        for file in files[:MOST_REFERENCES]:
            # Small files (settings, markers, indices) are hashed, so that a changed store is a new version.
            small = file.stat().st_size <= MOST_BYTES_TO_HASH
            name_inside = str(file.relative_to(root)) if file != root else file.name
            artifact.add_reference(file.as_uri(), name=name_inside, checksum=small)
        return artifact


def outcome_of(kind: type[BaseException] | None) -> int:
    """The exit code of a run that ends with an exception of this kind, or with none."""
    if kind is None:
        return FINISHED
    return INTERRUPTED if issubclass(kind, KeyboardInterrupt) else FAILED


class RunSeries:
    """W&B runs that one process writes one after the other, as fast as W&B goes; use it as a context manager.

    Starting W&B takes a second or two, each run after that about a tenth: its service is kept until the last.
    The arguments are those of :class:`codec_dist.tracking.Tracker`; with the mode ``disabled`` there is no series.

    Raises:
        TrackingError: as from a tracker; on exit: files that W&B could not complete.
    """

    def __init__(self, directory: Path, section: TrackingSection, *, stage: str, group: str) -> None:
        self._directory, self._section, self._stage, self._group = Path(directory), section, stage, group
        self._files: list[Path] = []

    @contextmanager
    def run(self, name: str, config: Mapping[str, Any]) -> Iterator[WandbRun]:
        """A run of the series for the length of a block."""
        run = WandbRun(self._directory, self._section, self._stage, self._group, config, name)
        self._files.append(run.file)
        try:
            yield run
        except BaseException as error:
            run.finish(outcome_of(type(error)))
            raise
        run.finish(FINISHED)

    def __enter__(self) -> Self:
        _keep_service()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _release_service() and kind is None and self._section.mode == "offline":
            for file in self._files:
                _check_complete(file)


def _keep_service() -> None:
    global _open_runs
    with _lock:
        _open_runs += 1


def _release_service() -> bool:
    """End W&B's service unless something still needs it; returns whether it ended.

    A run's `finish` returns before its file is flushed; ending the service waits for that. A run of the user's
    own, or another tracker, still needs the service: then it flushes by itself later.
    """
    global _open_runs
    import wandb

    with _lock:
        _open_runs -= 1
        ends = _open_runs == 0 and wandb.run is None
    if ends:
        wandb.teardown()
    return ends


def _check_complete(file: Path) -> None:
    """Raise where the disk may have been too full for W&B, whose service has ended, to complete an offline file."""
    if not file.exists() or shutil.disk_usage(file.parent).free < LEAST_FREE_BYTES:
        raise TrackingError(f"W&B may not have completed {file}, the disk is full: free space there; results are kept")


@contextmanager
def _own_service() -> Iterator[None]:
    """Let W&B start its service process for this process alone.

    W&B tells child processes of the service through the environment. Workers that are started during one
    stage outlive its service, and would try to reach it in a later one.
    """
    inherited = os.environ.pop("WANDB_SERVICE", None)
    try:
        yield
    finally:
        os.environ.pop("WANDB_SERVICE", None)
        if inherited is not None and inherited.split("-")[1:2] == [str(os.getpid())]:
            os.environ["WANDB_SERVICE"] = inherited


def _check_credentials() -> None:
    """Raise unless W&B would start without asking."""
    import wandb

    with _own_service():
        settings = wandb.setup().settings
    if not _has_credentials(settings):
        raise TrackingError(
            "tracking.mode is `online` but no W&B credentials were found: run `wandb login`, "
            "set WANDB_API_KEY, or use `--tracking.mode offline`"
        )


def _has_credentials(settings: Any) -> bool:
    """Whether there is a key, an identity token, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or getattr(settings, "api_key", None):
        return True
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or getattr(settings, "identity_token_file", None):
        return True
    host = urlsplit(str(settings.base_url)).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        with suppress(OSError, netrc.NetrcParseError):
            entries = netrc.netrc(str(path.expanduser()))
            if host in entries.hosts:
                return True
    return False


def _files(root: Path) -> Iterator[Path]:
    """The files below a folder (or the file itself), those nearest to the top first, in the order of names."""
    folders = [root]
    if root.is_file():
        yield root
        return
    while folders:
        deeper: list[Path] = []
        for folder in folders:
            children = sorted(folder.iterdir())
            yield from (child for child in children if child.is_file())
            deeper += (child for child in children if child.is_dir())
        folders = deeper


def _one_type(cells: list[Any]) -> list[Any]:
    """The cells of a column, as text if they are of several kinds (numbers and truth values are one)."""
    kinds = {float if isinstance(cell, bool | int | float) else type(cell) for cell in cells if cell is not None}
    if len(kinds) < 2:
        return [float(cell) if isinstance(cell, bool) else cell for cell in cells]
    return [None if cell is None else str(cell) for cell in cells]


def _definition(name: str) -> str:
    """A metric's name as `define_metric` wants it: an unescaped dot would mean a nested value."""
    return name.replace("\\", "\\\\").replace(".", "\\.")
