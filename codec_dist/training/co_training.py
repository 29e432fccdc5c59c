"""Which SAEs advance together, and which rank trains what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codec_dist.training.sae_jobs import SaeJob
from codec_dist.training.saving import SavedCohort, state_path

Key = tuple[str, str]
# Layer and quantity, and whether every rank holds all of their rows.
Source = tuple[Key, bool]
# Of the free memory six tenths are for rows (codec_dist.training.row_memory) and most of the rest for weights.
WEIGHTS_TO_ROWS = 0.6


@dataclass(frozen=True)
class Cohort:
    """SAEs on the same rows that take every step together, and are resumed together."""

    jobs: tuple[SaeJob, ...]
    state: Path
    """Written while they train."""
    saved: SavedCohort | None = None
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
class Bundle:
    """Cohorts that take their steps together, from the same epoch on and in batches of one size."""

    cohorts: tuple[Cohort, ...]
    resident: bool
    """Whether the rows of all of them fit in memory at once."""

    @property
    def jobs(self) -> tuple[SaeJob, ...]:
        """The SAEs of all cohorts."""
        return tuple(job for cohort in self.cohorts for job in cohort.jobs)

    @property
    def keys(self) -> list[Key]:
        """The layers and quantities whose rows they need."""
        return list(dict.fromkeys(cohort.key for cohort in self.cohorts))


def make_cohorts(
    jobs: Sequence[SaeJob], finished: Sequence[bool], saved: Sequence[SavedCohort], directory: Path
) -> list[Cohort]:
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
    cohorts: list[Cohort] = []
    # Where a state holds more SAEs than are asked for, these go on in one of their own, which is then the later one.
    for state in sorted(saved, key=lambda state: -state.epoch):
        members = [left[identity] for identity in state.identities if identity in left]
        if any(job.identity in unfinished for job in members):
            all_of_them = len(members) == len(state.identities)
            path = state.path if all_of_them else _state_of(members, directory)
            cohorts.append(Cohort(tuple(members), path, state))
            for job in members:
                del left[job.identity]
    alike: dict[tuple[object, ...], list[SaeJob]] = {}
    for job in left.values():
        if job.identity in unfinished:
            settings = job.settings
            kind = (job.key, job.fitted, settings.batch_size, settings.precision, settings.divide)
            alike.setdefault(kind, []).append(job)
    for members in alike.values():
        cohorts.append(Cohort(tuple(members), _state_of(members, directory)))
    return cohorts


def _state_of(members: Sequence[SaeJob], directory: Path) -> Path:
    return state_path(directory / members[0].rows_folder, [job.identity for job in members])


def make_bundles(
    cohorts: Sequence[Cohort],
    bytes_of: Mapping[Source, int],
    resident: Mapping[Source, bool],
    bytes_for_rows: int,
    *,
    bytes_per_parameter: int = 0,
    join: bool = True,
) -> list[Bundle]:
    """Put cohorts of several layers together while their rows fit in memory, and their weights beside them.

    One whose rows are not to be ``resident`` is a bundle of its own. Without ``join`` each is its own bundle in any
    case. The weights of an SAE do not depend on which cohorts are bundled with its own.
    """
    alike: dict[tuple[object, ...], list[Cohort]] = {}
    for number, cohort in enumerate(cohorts):
        settings = cohort.jobs[0].settings
        kind = (cohort.first_epoch, settings.batch_size, settings.precision, settings.divide)
        alone = () if join and not cohort.fitted else (number,)
        alike.setdefault((*kind, *alone), []).append(cohort)
    bundles: list[Bundle] = []
    for members in alike.values():
        together: list[Cohort] = []
        for cohort in members:
            if not resident[cohort.source]:
                bundles.append(Bundle((cohort,), resident=False))
                continue
            rows = sum(bytes_of[source] for source in {one.source for one in [*together, cohort]})
            weights = bytes_per_parameter and bytes_per_parameter * sum(one.parameters for one in [*together, cohort])
            if together and (rows > bytes_for_rows or weights > WEIGHTS_TO_ROWS * bytes_for_rows):
                bundles.append(Bundle(tuple(together), resident=True))
                together = []
            together.append(cohort)
        if together:
            bundles.append(Bundle(tuple(together), resident=True))
    return bundles


def hand_out(cohorts: Sequence[Cohort], ranks: int, of: int | None = None) -> list[list[Cohort]]:
    """A list of cohorts for each rank, the largest portion first, to the freest.

    Each layer and quantity is a portion, so that its rows are read once. Where ranks outnumber all of them (``of``,
    default: those that are left), the largest are divided: between cohorts, or between the SAEs of one that has
    not begun.
    """
    by_key: dict[Key, list[Cohort]] = {}
    for cohort in cohorts:
        by_key.setdefault(cohort.key, []).append(cohort)
    portions = list(by_key.values())
    wanted = ranks if ranks > (len(portions) if of is None else of) else 0
    while len(portions) < wanted and (divisible := [one for one in portions if _is_divisible(one)]):
        largest = max(divisible, key=_work)
        portions.remove(largest)
        portions += _halves(largest)
    shares: list[list[Cohort]] = [[] for _ in range(ranks)]
    for portion in sorted(portions, key=lambda portion: -_work(portion)):
        freest = min(shares, key=_work)
        freest += portion
    return shares


def _work(cohorts: Sequence[Cohort]) -> int:
    return sum(cohort.work for cohort in cohorts)


def _is_divisible(portion: Sequence[Cohort]) -> bool:
    first = portion[0]
    return len(portion) > 1 or (len(first.jobs) > 1 and first.saved is None)


def _halves(portion: Sequence[Cohort]) -> list[list[Cohort]]:
    """Two parts of about equal work, each in the order that it was in."""
    if len(portion) > 1:
        place = _middle([cohort.work for cohort in portion])
        return [list(portion[:place]), list(portion[place:])]
    jobs, folder = portion[0].jobs, portion[0].state.parent
    place = _middle([job.work for job in jobs])
    return [[Cohort(some, state_path(folder, [job.identity for job in some]))] for some in (jobs[:place], jobs[place:])]


def _middle(work: Sequence[int]) -> int:
    """Where to cut so that both sides have something, and about equally much."""
    return min(range(1, len(work)), key=lambda place: abs(sum(work[:place]) - sum(work[place:])))
