"""What one rank does: all groups, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from codec_dist.store import ContributionStore, StoreError
from codec_dist.training.closed_form import fit_baselines
from codec_dist.training.co_training import CoTrainingGroup, Key, Sweep, hand_out, make_groups, make_sweeps
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError, UnfitRowsError
from codec_dist.training.loop import GroupTraining
from codec_dist.training.parts import Parts, read_parts
from codec_dist.training.row_memory import bytes_for_rows, decide_residency
from codec_dist.training.rows import LayerRows
from codec_dist.training.sae_jobs import TrainingTask, is_finished
from codec_dist.training.saving import LeftOut, find_sweeps, remove_ended_states, write_left_out
from codec_dist.training.training_log import RankLog
from codec_dist.utils import hash_json, keep_freed_memory

# Values, gradients, two moments, and a copy while SAEs are evaluated or saved.
COPIES_OF_WEIGHTS = 5


def train_on_rank(task: TrainingTask, ranks: Ranks, after_group: Callable[[], None] = lambda: None) -> None:
    """Train the SAEs of ``task`` that are not finished, together with the other ranks.

    ``after_group`` is called by every rank equally often.

    Raises:
        TrainingError, StoreError, SaeError: rows that cannot be read or decomposed, or training that fails.
    """
    keep_freed_memory()
    store = ContributionStore(task.store_path)
    parts = read_parts(store, task.split_path)
    # Rank 0 decides, because files may change between two looks at them.
    sweeps = ranks.from_first(_sweeps(task) if ranks.rank == 0 else [])
    budget = task.bytes_for_rows if task.bytes_for_rows is not None else bytes_for_rows(ranks)
    done = _epochs_before(task, sweeps) if ranks.rank == 0 else 0
    if not task.spread:
        rank_log = RankLog(task.scratch, ranks.rank, done) if ranks.rank == 0 else None
        work = _Work(task, store, parts, ranks, budget)
        work.train(sweeps, rank_log, after_group)
        _account_for(task, ranks, [(work.left_out, work.damage)])
        return
    own = hand_out(sweeps, ranks.size, of=len({job.key for job in task.jobs}))[ranks.rank]
    work = _Work(task, store, parts, ranks.alone(), budget)
    work.train(own, RankLog(task.scratch, ranks.rank, done), _nothing)
    outcomes = ranks.gather((work.left_out, work.damage))  # waits until all are done
    after_group()
    _account_for(task, ranks, outcomes)


def _account_for(task: TrainingTask, ranks: Ranks, outcomes: Sequence[tuple[list[LeftOut], list[str]]]) -> None:
    """Note what was left out, by all ranks; an error where nothing is left, or where the store is damaged."""
    left_out = [item for each, _ in outcomes for item in each]
    damage = [text for _, each in outcomes for text in each]
    if ranks.rank == 0:
        write_left_out(task.scratch, left_out)
    if damage:
        raise StoreError(damage[0] + ("; all other SAEs were trained" if len(left_out) < len(task.jobs) else ""))
    if len({item.folder for item in left_out}) == len(task.jobs):
        raise TrainingError(f"no SAE could be trained: {left_out[0].reason}")


@contextmanager
def _explained_when_too_large(group: CoTrainingGroup) -> Iterator[None]:
    """Turn a GPU's lack of memory into words; on a CPU the system may end the process instead."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        first = group.jobs[0]
        raise TrainingError(
            f"{len(group.jobs)} SAEs that advance together ({first.label} and so on) do not fit in memory: train "
            "fewer at a time (split the grid over several configs), or spread each dictionary over GPUs "
            "(training.divide)"
        ) from error


def _sweeps(task: TrainingTask) -> list[Sweep]:
    folders = dict.fromkeys(task.directory / "sae" / job.rows_folder for job in task.jobs)
    saved = [state for folder in folders for state in find_sweeps(folder)]
    finished = [is_finished(task.folder(job)) for job in task.jobs]
    sweeps = make_sweeps(task.jobs, finished, saved, task.directory / "sae")
    for folder in folders:
        remove_ended_states(folder, is_finished)
    return sweeps


def _epochs_before(task: TrainingTask, sweeps: Sequence[Sweep]) -> int:
    """Of the epochs of all SAEs, those that were done before."""
    left = sum(job.epochs - sweep.first_epoch for sweep in sweeps for job in sweep.jobs)
    return sum(job.epochs for job in task.jobs) - left


class _Work:
    """What one rank, or all together, have to train, and the rows that are held for it."""

    def __init__(
        self, task: TrainingTask, store: ContributionStore, parts: Parts, ranks: Ranks, bytes_for_rows: int
    ) -> None:
        self._task, self._store, self._parts, self._ranks = task, store, parts, ranks
        self._budget = bytes_for_rows
        self._rows: dict[tuple[Key, bool], LayerRows] = {}
        self.left_out: list[LeftOut] = []
        """SAEs that could not be trained; the same on all ranks that train together."""
        self.damage: list[str] = []
        """What could not be read of the store."""

    def train(self, sweeps: Sequence[Sweep], rank_log: RankLog | None, after_group: Callable[[], None]) -> None:
        """Train group after group."""
        sources = dict.fromkeys(sweep.source for sweep in sweeps)
        # Shares of ranks may differ by a row, but all must come to the same decisions.
        sizes = {source: max(self._ranks.gather(self._of(source[0], whole=source[1]).bytes)) for source in sources}
        resident = {sweep.source: self._is_resident(sweep, sizes[sweep.source]) for sweep in sweeps}
        advance = rank_log.epochs.advance if rank_log else _ignore
        size = COPIES_OF_WEIGHTS * getattr(torch, self._task.dtype).itemsize
        groups = make_groups(
            sweeps, sizes, resident, self._budget, bytes_per_parameter=size, join=not self._task.spread
        )
        for group in groups:
            with _explained_when_too_large(group):
                self._train_group(group, rank_log, advance)
            if rank_log:
                rank_log.epochs.show()
            after_group()

    def _train_group(self, group: CoTrainingGroup, rank_log: RankLog | None, advance: Callable[[int], None]) -> None:
        unfit = self._make_room(group)
        for sweep in group.sweeps:
            if (reason := unfit.get(sweep.key)) is not None:
                self.left_out += [LeftOut.of(job, reason) for job in sweep.jobs]
                advance(sum(job.epochs - sweep.first_epoch for job in sweep.jobs))
        sweeps = tuple(sweep for sweep in group.sweeps if sweep.key not in unfit)
        if not sweeps:
            return
        group, first = CoTrainingGroup(sweeps, group.resident), sweeps[0]
        rows = {key: self._of(key, whole=first.divided) for key in group.keys}
        if first.fitted:
            source = rows[first.key] if group.resident else self._of(first.key, whole=True)
            self.left_out += fit_baselines(
                self._task, first, rows[first.key], source, self._parts, self._ranks, rank_log, advance
            )
        else:
            training = GroupTraining(self._task, group, rows, self._parts, self._ranks, rank_log)
            training.run(advance)
            self.left_out += training.left_out

    def _is_resident(self, sweep: Sweep, needed: int) -> bool:
        folder = self._task.directory / "sae" / sweep.jobs[0].rows_folder
        rows = {marker.shard: marker.rows for marker in self._store.markers.values()}
        rows_hash = hash_json([self._store.identity_hash, rows, self._parts.split_hash, self._task.dtype])
        return decide_residency(folder, needed, self._budget, self._ranks, rows_hash=rows_hash, whole=sweep.divided)

    def _of(self, key: Key, *, whole: bool) -> LayerRows:
        """The rows of a layer and quantity; ``whole``: none of them left to other ranks."""
        whole = whole and self._ranks.size > 1
        if (key, whole) not in self._rows:
            ranks = self._ranks.alone() if whole else self._ranks
            dtype = getattr(torch, self._task.dtype)
            self._rows[key, whole] = LayerRows(
                self._store, *key, self._parts, ranks, dtype=dtype, window_bytes=self._task.window_bytes
            )
        return self._rows[key, whole]

    def _make_room(self, group: CoTrainingGroup) -> dict[Key, str]:
        """Load what the group needs; first unload the rest if both do not fit. Returns what no SAE can use, and why.

        All ranks that train together find the same.
        """
        divided = group.sweeps[0].divided
        needed = {key: self._of(key, whole=divided) for key in group.keys}
        resident = list(needed.values()) if group.resident else []
        held = [item for item in self._rows.values() if item.resident]
        if sum(item.bytes for item in {*held, *resident}) > self._budget or not group.resident:
            for item in held:
                if item not in resident:
                    item.unload()
        unfit = {}
        for key, rows in needed.items():
            found = self._ranks.gather(self._prepare(rows, group.resident))
            if (reason := next(filter(None, found), None)) is not None:
                rows.unload()
                unfit[key] = reason
        return unfit

    def _prepare(self, rows: LayerRows, resident: bool) -> str | None:
        """Load rows, or only look through them; why they cannot be used, if so."""
        try:
            if resident:
                rows.load()
            rows.calibration()
        except UnfitRowsError as error:
            return str(error)
        except StoreError as error:
            self.damage.append(str(error))
            return str(error)
        return None


def _ignore(_: int) -> None:
    """Ranks other than the first report no progress."""


def _nothing() -> None:
    """Ranks that train apart do not meet after each group."""
