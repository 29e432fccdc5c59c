"""Which SAEs advance together, and which rank trains what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codec_dist.training.sae_jobs import SaeJob
from codec_dist.training.saving import SavedSweep, state_path

Key = tuple[str, str]
# Layer and quantity, and whether every rank holds all of their rows.
Source = tuple[Key, bool]
# Of the free memory six tenths are for rows (codec_dist.training.row_memory) and most of the rest for weights.
WEIGHTS_TO_ROWS = 0.6


@dataclass(frozen=True)
class Sweep:
    """SAEs on the same rows that take every step together, and are resumed together."""

    jobs: tuple[SaeJob, ...]
    state: Path
    """Written while they train."""
    saved: SavedSweep | None = None
    """What they are resumed from; it may hold others, too."""

    @property
    def first_epoch(self) -> int:
        """Epochs that are done."""
        return self.saved.epoch if self.saved else 0

    @property
    def key(self) -> Key:
        """Layer and quantity."""
        return self.jobs[0].key

    @property
    def divided(self) -> bool:
        """Whether their dictionaries are spread over the ranks."""
        return self.jobs[0].settings.divide and not self.fitted

    @property
    def source(self) -> Source:
        """The rows that each rank needs."""
        return self.key, self.divided

    @property
    def fitted(self) -> bool:
        """Whether they are baselines that are fitted, not trained."""
        return self.jobs[0].fitted

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(job.parameters for job in self.jobs)

    @property
    def work(self) -> int:
        """Arithmetic of their training, in numbers that are proportional to it."""
        return sum(job.work for job in self.jobs)


@dataclass(frozen=True)
class CoTrainingGroup:
    """Sweeps that take their steps together, from the same epoch on and in batches of one size."""

    sweeps: tuple[Sweep, ...]
    resident: bool
    """Whether the rows of all of them fit in memory at once."""

    @property
    def jobs(self) -> tuple[SaeJob, ...]:
        """The SAEs of all sweeps."""
        return tuple(job for sweep in self.sweeps for job in sweep.jobs)

    @property
    def keys(self) -> list[Key]:
        """The layers and quantities whose rows they need."""
        return list(dict.fromkeys(sweep.key for sweep in self.sweeps))


def make_sweeps(
    jobs: Sequence[SaeJob], finished: Sequence[bool], saved: Sequence[SavedSweep], directory: Path
) -> list[Sweep]:
    """Put together what was saved together, and of the rest what can be trained from one pass over its rows.

    SAEs that are finished already but were saved together with some that are not are trained again from there,
    so that the others' arithmetic, which a stack shares, stays the same.

    Args:
        jobs: everything that is asked for.
        finished: whether each was trained to its end.
        saved: states to resume from.
        directory: the folder ``sae`` of the run.
    """
    left = {job.identity: job for job in jobs}
    unfinished = {job.identity for job, done in zip(jobs, finished, strict=True) if not done}
    sweeps: list[Sweep] = []
    # Where a state holds more SAEs than are asked for, these go on in one of their own, which is then the later one.
    for state in sorted(saved, key=lambda state: -state.epoch):
        members = [left[identity] for identity in state.identities if identity in left]
        if any(job.identity in unfinished for job in members):
            all_of_them = len(members) == len(state.identities)
            path = state.path if all_of_them else _state_of(members, directory)
            sweeps.append(Sweep(tuple(members), path, state))
            for job in members:
                del left[job.identity]
    alike: dict[tuple[object, ...], list[SaeJob]] = {}
    for job in left.values():
        if job.identity in unfinished:
            settings = job.settings
            kind = (job.key, job.fitted, settings.batch_size, settings.precision, settings.divide)
            alike.setdefault(kind, []).append(job)
    for members in alike.values():
        sweeps.append(Sweep(tuple(members), _state_of(members, directory)))
    return sweeps


def _state_of(members: Sequence[SaeJob], directory: Path) -> Path:
    return state_path(directory / members[0].rows_folder, [job.identity for job in members])


def make_groups(
    sweeps: Sequence[Sweep],
    bytes_of: Mapping[Source, int],
    resident: Mapping[Source, bool],
    bytes_for_rows: int,
    *,
    bytes_per_parameter: int = 0,
    join: bool = True,
) -> list[CoTrainingGroup]:
    """Put sweeps of several layers together while their rows fit in memory, and their weights beside them.

    One whose rows are not to be ``resident`` is a group of its own. Without ``join`` each is its own group in any
    case. The weights of an SAE do not depend on which sweeps are in a group with its own.
    """
    alike: dict[tuple[object, ...], list[Sweep]] = {}
    for number, sweep in enumerate(sweeps):
        settings = sweep.jobs[0].settings
        kind = (sweep.first_epoch, settings.batch_size, settings.precision, settings.divide)
        alone = () if join and not sweep.fitted else (number,)
        alike.setdefault((*kind, *alone), []).append(sweep)
    groups: list[CoTrainingGroup] = []
    for members in alike.values():
        together: list[Sweep] = []
        for sweep in members:
            if not resident[sweep.source]:
                groups.append(CoTrainingGroup((sweep,), resident=False))
                continue
            rows = sum(bytes_of[source] for source in {item.source for item in [*together, sweep]})
            weights = bytes_per_parameter and bytes_per_parameter * sum(item.parameters for item in [*together, sweep])
            if together and (rows > bytes_for_rows or weights > WEIGHTS_TO_ROWS * bytes_for_rows):
                groups.append(CoTrainingGroup(tuple(together), resident=True))
                together = []
            together.append(sweep)
        if together:
            groups.append(CoTrainingGroup(tuple(together), resident=True))
    return groups


def hand_out(sweeps: Sequence[Sweep], ranks: int, of: int | None = None) -> list[list[Sweep]]:
    """A list of sweeps for each rank, the largest portion first, to the freest.

    Each layer and quantity is a portion, so that its rows are read once. Where ranks outnumber all of them (``of``,
    default: those that are left), the largest are divided: between sweeps, or between the SAEs of one that has
    not begun.
    """
    by_key: dict[Key, list[Sweep]] = {}
    for sweep in sweeps:
        by_key.setdefault(sweep.key, []).append(sweep)
    portions = list(by_key.values())
    wanted = ranks if ranks > (len(portions) if of is None else of) else 0
    while len(portions) < wanted and (divisible := [item for item in portions if _is_divisible(item)]):
        largest = max(divisible, key=_work)
        portions.remove(largest)
        portions += _halves(largest)
    shares: list[list[Sweep]] = [[] for _ in range(ranks)]
    for portion in sorted(portions, key=lambda portion: -_work(portion)):
        freest = min(shares, key=_work)
        freest += portion
    return shares


def _work(sweeps: Sequence[Sweep]) -> int:
    return sum(sweep.work for sweep in sweeps)


def _is_divisible(portion: Sequence[Sweep]) -> bool:
    first = portion[0]
    return len(portion) > 1 or (len(first.jobs) > 1 and first.saved is None)


def _halves(portion: Sequence[Sweep]) -> list[list[Sweep]]:
    """Two parts of about equal work, each in the order that it was in."""
    if len(portion) > 1:
        place = _middle([sweep.work for sweep in portion])
        return [list(portion[:place]), list(portion[place:])]
    jobs, folder = portion[0].jobs, portion[0].state.parent
    place = _middle([job.work for job in jobs])
    return [[Sweep(some, state_path(folder, [job.identity for job in some]))] for some in (jobs[:place], jobs[place:])]


def _middle(work: Sequence[int]) -> int:
    """Where to cut so that both sides have something, and about equally much."""
    return min(range(1, len(work)), key=lambda place: abs(sum(work[:place]) - sum(work[place:])))
