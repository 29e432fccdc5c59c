"""From a store to trained SAEs: one Ray Train job for all of them."""

import fcntl
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist

from codec_dist.cluster_runtime import MEMORY, KernelKills, explain_loss, worker_environment
from codec_dist.config import ClusterSection, SaeGroup, SaeSection, TrackingSection
from codec_dist.store import ContributionStore
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.training.model_selection import select_saes
from codec_dist.training.parts import read_parts
from codec_dist.training.rank import train_on_rank
from codec_dist.training.row_memory import failed_allocation
from codec_dist.training.sae_jobs import SaeJob, TrainingTask, check_training, is_finished, plan_jobs
from codec_dist.training.saving import (
    LeftOut,
    damaged_states,
    read_left_out,
    remove_ended_states,
    tell_left_out,
    write_left_out,
)
from codec_dist.training.training_log import RANK_LOG_FILES as NOTES
from codec_dist.training.training_log import Logbook, read_progress, training_log, write_sae_runs
from codec_dist.utils import (
    CodecError,
    DiskFullError,
    Progress,
    absolute_location,
    full_disk,
    naming_full_disk,
    read_json,
    write_json_atomically,
)

FAILURE_FILE = "failure.json"
LOCK_FILE = ".train.lock"
# What is set aside so that a rank that finds the disk full can still say so.
RESERVE_FILE, RESERVE_BYTES = "reserve", 1 << 16
SECONDS_BETWEEN_LOOKS = 0.5
CPU_RANKS = 2


@dataclass(frozen=True)
class TrainedSae:
    """A finished SAE on disk."""

    layer: str
    quantity: str
    architecture: str
    folder: Path
    """Holds config.json, model.safetensors, metrics.json and history.jsonl."""
    ev_select: float
    ev_evaluate: float
    """Explained variance of held-out rows; NaN where undefined."""
    selected: bool
    """Whether it is chosen among those of its layer and quantity (``sae.selection``)."""
    resumed: bool
    """Whether it was finished before this call."""


def train_saes(
    store_path: str | Path,
    split_path: Path,
    groups: Sequence[SaeGroup],
    sae: SaeSection,
    directory: Path,
    seed: int,
    cluster: ClusterSection,
    tracking: TrackingSection,
    *,
    name: str = "run",
    correlation_threshold: float = 0.2,
    dtype: str = "float32",
    bytes_for_rows: int | None = None,
) -> list[TrainedSae]:
    """Train every SAE that ``groups`` ask for and that is not finished yet, inside an initialised Ray.

    Writes ``directory/sae/<layer>/<quantity>/<hash>-s<seed>/`` and what :func:`select_saes` writes.
    A training that was killed goes on from its last resume states; on CPUs with the same number of ranks
    the weights are the same, bit by bit.

    Args:
        store_path: folder or URL of the contribution store.
        split_path: ``split.parquet``.
        groups: what to train.
        sae: how often to evaluate and to write resume states.
        directory: the run's folder, seen by all nodes.
        seed: the run's seed.
        cluster: number of ranks, their threads, and how often a training whose worker dies is restarted.
        tracking: where evaluations are logged.
        name: the run's name, under which the tracker groups.
        correlation_threshold: a mode with a class correlation above this counts as class-correlated.
        dtype: type of rows and weights.
        bytes_for_rows: memory that each rank may fill with rows; default: measured. Rows that do not fit
            are streamed.

    Returns:
        One entry per SAE, in the order of ``groups``. What could not be trained (rows that are all equal or not
        finite, a loss that diverged) is left out: a line tells, and ``directory/sae/left_out.json`` keeps the reasons.

    Raises:
        TrainingError: a store with missing shards, unknown layers or quantities, a grid of unknown names or no
            members, an empty part, nothing that can be trained, another SAE in a folder, workers that died too often,
            or a cluster without room. StoreError, SaeError: as from those packages.
        KeyboardInterrupt: Ctrl-C, after the ranks were ended and the W&B run was closed as interrupted.
    """
    store_path, split_path, directory = absolute_location(store_path), Path(split_path), Path(directory)
    store = ContributionStore(store_path)
    _check_complete(store)
    parts = read_parts(store, split_path)
    check_training(store.layers, list(store.quantities), groups, sae.spread)
    jobs = plan_jobs(store, groups, parts.split_hash, seed)
    folders = {job: directory / "sae" / job.folder for job in jobs}
    finished = {job for job in jobs if is_finished(folders[job])}
    for job in finished:
        _check_folder(job, folders[job])
    rows_folders = dict.fromkeys(directory / "sae" / job.rows_folder for job in jobs)
    for path in (path for folder in rows_folders for path in damaged_states(folder)):
        sys.stderr.write(f"train: the resume state {path} is damaged and not used: its SAEs start again\n")
    left_out: list[LeftOut] = []
    if len(finished) == len(jobs):
        for folder in rows_folders:
            remove_ended_states(folder, is_finished)
    else:
        task = TrainingTask(
            directory.resolve(), store_path, split_path.resolve(), tuple(jobs), name, seed,
            sae.evaluations, sae.checkpoints, tracking, correlation_threshold, dtype, cluster.cpus_per_actor,
            sae.spread == "saes", bytes_for_rows,
        )  # fmt: skip
        left_out = _train(task, cluster)
        tell_left_out(left_out)
    write_left_out(directory / "sae", left_out)
    gone = {item.folder for item in left_out}
    trained = [job for job in jobs if job.folder.as_posix() not in gone]
    in_use = select_saes(directory / "sae", [folders[job] for job in trained], sae.selection)
    write_sae_runs(directory, tracking, name, trained, in_use)
    return _collect(trained, folders, finished, set(in_use.values()))


def _check_complete(store: ContributionStore) -> None:
    missing = [name for number, (name, _) in enumerate(store.shards) if number not in store.markers]
    if missing:
        raise TrainingError(
            f"{store.location} holds {len(store.markers)} of {len(store.shards)} shards (not {missing[0]}): "
            "run `codec-dist extract` until it is complete"
        )


def _check_folder(job: SaeJob, folder: Path) -> None:
    """Refuse a folder that holds another SAE than its name says."""
    try:
        config = read_json(folder / "config.json")
        found = (config["architecture"], config["channels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"cannot read the SAE in {folder} ({error!r}): remove it, train again") from error
    if found != (job.architecture, job.channels):
        raise TrainingError(
            f"{folder} holds an SAE of architecture {found[0]!r} and {found[1]} channels instead of "
            f"{job.architecture!r} and {job.channels}: remove it, train again"
        )


def _train(task: TrainingTask, cluster: ClusterSection) -> list[LeftOut]:
    """Run Ray Train; returns what could not be trained."""
    # Here and below, not at the top: importing Ray Train takes seconds, which every command would pay.
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    ranks, with_gpus = _count_ranks(cluster)
    kills = KernelKills()
    resources = {"CPU": task.threads} | ({"GPU": 1} if with_gpus else {})
    trainer = TorchTrainer(
        _rank_main,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if with_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=with_gpus, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(task.scratch),
            failure_config=FailureConfig(max_failures=cluster.attempts - 1),
            worker_runtime_env={"env_vars": worker_environment(task.threads, int(with_gpus))},
        ),
    )
    with _scratch(task), training_log(task) as logbook:
        try:
            with _watched(task, logbook), _interruptible():
                trainer.fit()
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            # The second where the actor is lost that looks after the ranks, which Ray Train does not restart.
            raise _explain(task, ranks, error, kills) from error
        if (message := _failure(task)) is not None:
            raise TrainingError(message)
        return read_left_out(task.scratch)


@contextmanager
def _scratch(task: TrainingTask) -> Iterator[None]:
    """A folder for files that live only while the training runs; one training at a time has it."""
    task.scratch.parent.mkdir(parents=True, exist_ok=True)
    with open(task.scratch.parent / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"another training is at work in {task.directory}: wait until it ends, or choose another run.directory"
            ) from error
        except OSError:
            sys.stderr.write(f"train: cannot lock {lock.name}: see to it that no other training is at work there\n")
        _clear(task.scratch)
        with naming_full_disk(task.scratch):
            task.scratch.mkdir(exist_ok=True)
            (task.scratch / RESERVE_FILE).write_bytes(bytes(RESERVE_BYTES))
        try:
            yield
        finally:
            _clear(task.scratch)
            with suppress(OSError):
                task.scratch.rmdir()


def _clear(scratch: Path) -> None:
    """Remove all but evaluations that are not logged, as after a kill, or where the disk was full."""
    for left in scratch.glob("*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif not left.match(NOTES):
            left.unlink(missing_ok=True)


def _rank_main(config: dict[str, Any]) -> None:
    from ray.train import report
    from ray.train.torch import get_device

    task: TrainingTask = config["task"]
    if _failure(task) is not None:
        return
    torch.set_num_threads(task.threads)
    try:
        train_on_rank(task, Ranks(get_device()), after_group=lambda: report({}))
        return
    except CodecError as error:
        message = str(error)
    # The user's to repair: no error for Ray, which would start all ranks again only to fail again. Ranks that
    # did not meet the error are freed from waiting for this one.
    # Where the disk is full there is still this much.
    (task.scratch / RESERVE_FILE).unlink(missing_ok=True)
    write_json_atomically(task.scratch / FAILURE_FILE, {"message": message})
    if dist.is_initialized():
        dist.destroy_process_group()


def _count_ranks(cluster: ClusterSection) -> tuple[int, bool]:
    """Ranks of the training, and whether each has a GPU."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    room = gpus or cpus // cluster.cpus_per_actor
    ranks = cluster.training_workers or (gpus or min(CPU_RANKS, room))
    if not 1 <= ranks <= room:
        found = f"{gpus} GPUs" if gpus else f"{cpus} CPUs, {cluster.cpus_per_actor} of them per rank"
        raise TrainingError(
            f"{max(ranks, 1)} ranks of training do not fit in a cluster with {found}: "
            "lower cluster.training_workers or cluster.cpus_per_actor"
        )
    return ranks, gpus > 0


@contextmanager
def _watched(task: TrainingTask, logbook: Logbook) -> Iterator[None]:
    """Show what the ranks have counted, and log what they have noted, while the calling thread waits for Ray Train."""
    total = sum(job.epochs for job in task.jobs)
    over = threading.Event()
    with Progress("train", total, "SAE epochs") as progress:

        def watch() -> None:
            shown, last_look, logs = 0, False, True
            while not last_look:
                last_look = over.wait(SECONDS_BETWEEN_LOOKS)
                done = read_progress(task.scratch)
                if done > shown:
                    progress.advance(done - shown)
                    shown = done
                logs = logs and _catches_up(logbook)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _catches_up(logbook: Logbook) -> bool:
    """Whether logging works; if not, the error is met again when the log is closed, and does not end the ranks now."""
    try:
        logbook.catch_up()
    except Exception:  # noqa: BLE001
        return False
    return True


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the ranks before they do what they would outside, and leave the handlers as they were.

    Called in the main thread, ``fit`` sets a handler of SIGINT for good: it ends the ranks and then exits,
    with a SystemExit. SIGTERM takes the same way here. Which signal it was is heard on a wakeup descriptor.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    listener, speaker = socket.socketpair()
    with listener, speaker:
        listener.setblocking(False)
        speaker.setblocking(False)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if callable(handlers[signal.SIGTERM]):
            signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        descriptor = signal.set_wakeup_fd(speaker.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in handlers.items():
                # None stands for a handler that was not set from Python, which cannot be put back.
                if handler is not None:
                    signal.signal(number, handler)
            heard = _signals_heard(listener)
            for number, handler in handlers.items():
                if number in heard and callable(handler):
                    handler(number, None)
            if signal.SIGINT in heard:
                raise KeyboardInterrupt


def _signals_heard(listener: socket.socket) -> bytes:
    try:
        return listener.recv(4096)
    except BlockingIOError:
        return b""


def _failure(task: TrainingTask) -> str | None:
    """What a rank met that is the user's to repair, if any did."""
    path = task.scratch / FAILURE_FILE
    return str(read_json(path)["message"]) if path.exists() else None


def _explain(task: TrainingTask, ranks: int, error: Exception, kills: KernelKills) -> CodecError:
    if (message := _failure(task)) is not None:
        return TrainingError(message)
    if (reason := full_disk(error)) is not None:
        return DiskFullError(task.directory, reason)
    causes: list[BaseException] = [*getattr(error, "worker_failures", {}).values()] or [error]
    kept = "what was reached is kept, and the same command goes on from there"
    losses = [explain_loss(cause, killed_by_kernel=kills.claim) for cause in causes]
    killed = next((loss for loss in losses if loss.cause == MEMORY), None)
    line = failed_allocation(causes)
    if killed is not None or line is not None:
        happened = f"was lost: {killed.text}" if killed is not None else f"ran out of memory: {line}"
        return TrainingError(
            f"a rank of training (of {ranks}) {happened}. Let fewer ranks share a node (cluster.training_workers), "
            "train fewer SAEs at a time (smaller grids, fewer groups), or use nodes or GPUs with more memory; "
            f"{kept}"
        )
    if any(words in str(causes[0]) for words in ("died", "unavailable", "health check")):
        return TrainingError(f"a rank of training (of {ranks}) was lost: {losses[0].text}; {kept}")
    lines = [line.strip() for line in str(causes[0]).splitlines() if line.strip()]
    last_line = lines[-1] if lines else type(error).__name__
    return TrainingError(f"training on {ranks} ranks failed: {last_line}; {kept}")


def _collect(
    jobs: Sequence[SaeJob], folders: dict[SaeJob, Path], finished: set[SaeJob], in_use: set[Path]
) -> list[TrainedSae]:
    evs: dict[SaeJob, tuple[float, float]] = {}
    for job in jobs:
        try:
            metrics = read_json(folders[job] / "metrics.json")
            select, evaluate = metrics["select"]["ev"], metrics["evaluate"]["ev"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"cannot read the metrics in {folders[job]} ({error!r}): remove it, train again"
            ) from error
        evs[job] = tuple(float("nan") if ev is None else float(ev) for ev in (select, evaluate))  # type: ignore[assignment]
    return [
        TrainedSae(
            job.layer, job.quantity, job.architecture, folders[job], *evs[job], folders[job] in in_use, job in finished
        )
        for job in jobs
    ]
