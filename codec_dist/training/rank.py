"""What one rank does: all bundles, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from codec_dist.store import ContributionStore, StoreError
from codec_dist.training.closed_form import fit_baselines
from codec_dist.training.co_training import Bundle, Cohort, Key, hand_out, make_bundles, make_cohorts
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError, UnfitRowsError
from codec_dist.training.loop import BundleTraining
from codec_dist.training.parts import Parts, read_parts
from codec_dist.training.row_memory import bytes_for_rows, decide_residency
from codec_dist.training.rows import LayerRows
from codec_dist.training.sae_jobs import TrainingTask, is_finished
from codec_dist.training.saving import LeftOut, find_cohorts, remove_ended_states, write_left_out
from codec_dist.training.training_log import Spool
from codec_dist.utils import hash_json, keep_freed_memory

# Values, gradients, two moments, and a copy while SAEs are evaluated or saved.
COPIES_OF_WEIGHTS = 5


def train_on_rank(task: TrainingTask, ranks: Ranks, after_bundle: Callable[[], None] = lambda: None) -> None:
    """Train the SAEs of ``task`` that are not finished, together with the other ranks.

    ``after_bundle`` is called by every rank equally often.

    Raises:
        TrainingError, StoreError, SaeError: rows that cannot be read or decomposed, or training that fails.
    """
    keep_freed_memory()
    store = ContributionStore(task.store_path)
    parts = read_parts(store, task.split_path)
    # Rank 0 decides, because files may change between two looks at them.
    cohorts = ranks.from_first(_cohorts(task) if ranks.rank == 0 else [])
    budget = task.bytes_for_rows if task.bytes_for_rows is not None else bytes_for_rows(ranks)
    done = _epochs_before(task, cohorts) if ranks.rank == 0 else 0
    if not task.spread:
        spool = Spool(task.scratch, ranks.rank, done) if ranks.rank == 0 else None
        work = _Work(task, store, parts, ranks, budget)
        work.train(cohorts, spool, after_bundle)
        _account_for(task, ranks, [(work.left_out, work.damage)])
        return
    mine = hand_out(cohorts, ranks.size, of=len({job.key for job in task.jobs}))[ranks.rank]
    work = _Work(task, store, parts, ranks.alone(), budget)
    work.train(mine, Spool(task.scratch, ranks.rank, done), _nothing)
    outcomes = ranks.gather((work.left_out, work.damage))  # waits until all are done
    after_bundle()
    _account_for(task, ranks, outcomes)


def _account_for(task: TrainingTask, ranks: Ranks, outcomes: Sequence[tuple[list[LeftOut], list[str]]]) -> None:
    """Note what was left out, by all ranks; an error where nothing is left, or where the store is damaged."""
    left_out = [one for each, _ in outcomes for one in each]
    damage = [text for _, each in outcomes for text in each]
    if ranks.rank == 0:
        write_left_out(task.scratch, left_out)
    if damage:
        raise StoreError(damage[0] + ("; all other SAEs were trained" if len(left_out) < len(task.jobs) else ""))
    if len({one.folder for one in left_out}) == len(task.jobs):
        raise TrainingError(f"no SAE could be trained: {left_out[0].reason}")


@contextmanager
def _told_when_too_large(bundle: Bundle) -> Iterator[None]:
    """Turn a GPU's lack of memory into words; on a CPU the system may end the process instead."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        first = bundle.jobs[0]
        raise TrainingError(
            f"{len(bundle.jobs)} SAEs that advance together ({first.label} and so on) do not fit in memory: train "
            "fewer at a time (split the grid over several configs), or spread each dictionary over GPUs "
            "(training.divide)"
        ) from error


def _cohorts(task: TrainingTask) -> list[Cohort]:
    folders = dict.fromkeys(task.directory / "sae" / job.rows_folder for job in task.jobs)
    saved = [state for folder in folders for state in find_cohorts(folder)]
    finished = [is_finished(task.folder(job)) for job in task.jobs]
    cohorts = make_cohorts(task.jobs, finished, saved, task.directory / "sae")
    for folder in folders:
        remove_ended_states(folder, is_finished)
    return cohorts


def _epochs_before(task: TrainingTask, cohorts: Sequence[Cohort]) -> int:
    """Of the epochs of all SAEs, those that were done before."""
    left = sum(job.epochs - cohort.first_epoch for cohort in cohorts for job in cohort.jobs)
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

    def train(self, cohorts: Sequence[Cohort], spool: Spool | None, after_bundle: Callable[[], None]) -> None:
        """Train bundle after bundle."""
        sources = dict.fromkeys(cohort.source for cohort in cohorts)
        # Shares of ranks may differ by a row, but all must come to the same decisions.
        sizes = {source: max(self._ranks.gather(self._of(source[0], whole=source[1]).bytes)) for source in sources}
        resident = {cohort.source: self._is_resident(cohort, sizes[cohort.source]) for cohort in cohorts}
        advance = spool.epochs.advance if spool else _ignore
        size = COPIES_OF_WEIGHTS * getattr(torch, self._task.dtype).itemsize
        bundles = make_bundles(
            cohorts, sizes, resident, self._budget, bytes_per_parameter=size, join=not self._task.spread
        )
        for bundle in bundles:
            with _told_when_too_large(bundle):
                self._train_bundle(bundle, spool, advance)
            if spool:
                spool.epochs.show()
            after_bundle()

    def _train_bundle(self, bundle: Bundle, spool: Spool | None, advance: Callable[[int], None]) -> None:
        unfit = self._make_room(bundle)
        for cohort in bundle.cohorts:
            if (reason := unfit.get(cohort.key)) is not None:
                self.left_out += [LeftOut.of(job, reason) for job in cohort.jobs]
                advance(sum(job.epochs - cohort.first_epoch for job in cohort.jobs))
        cohorts = tuple(cohort for cohort in bundle.cohorts if cohort.key not in unfit)
        if not cohorts:
            return
        bundle, first = Bundle(cohorts, bundle.resident), cohorts[0]
        rows = {key: self._of(key, whole=first.divided) for key in bundle.keys}
        if first.fitted:
            source = rows[first.key] if bundle.resident else self._of(first.key, whole=True)
            self.left_out += fit_baselines(
                self._task, first, rows[first.key], source, self._parts, self._ranks, spool, advance
            )
        else:
            training = BundleTraining(self._task, bundle, rows, self._parts, self._ranks, spool)
            training.run(advance)
            self.left_out += training.left_out

    def _is_resident(self, cohort: Cohort, needed: int) -> bool:
        folder = self._task.directory / "sae" / cohort.jobs[0].rows_folder
        rows = {marker.shard: marker.rows for marker in self._store.markers.values()}
        rows_hash = hash_json([self._store.identity_hash, rows, self._parts.split_hash, self._task.dtype])
        return decide_residency(folder, needed, self._budget, self._ranks, rows_hash=rows_hash, whole=cohort.divided)

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

    def _make_room(self, bundle: Bundle) -> dict[Key, str]:
        """Load what the bundle needs; first unload the rest if both do not fit. Returns what no SAE can use, and why.

        All ranks that train together find the same.
        """
        divided = bundle.cohorts[0].divided
        needed = {key: self._of(key, whole=divided) for key in bundle.keys}
        resident = list(needed.values()) if bundle.resident else []
        held = [one for one in self._rows.values() if one.resident]
        if sum(one.bytes for one in {*held, *resident}) > self._budget or not bundle.resident:
            for one in held:
                if one not in resident:
                    one.unload()
        unfit = {}
        for key, rows in needed.items():
            found = self._ranks.gather(self._prepare(rows, bundle.resident))
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
    """Ranks that train apart do not meet after each bundle."""
