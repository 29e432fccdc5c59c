"""Which SAEs advance together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codec_dist.training.plan import SaeJob


@dataclass(frozen=True)
class Bundle:
    """SAEs that take their steps together, from the same epoch on."""

    jobs: tuple[SaeJob, ...]
    first_epoch: int
    resident: bool
    """Whether the rows of all of them fit in memory at once."""

    @property
    def keys(self) -> list[tuple[str, str]]:
        """The layers and quantities whose rows they need."""
        return list(dict.fromkeys(job.key for job in self.jobs))


def make_bundles(
    jobs: Sequence[SaeJob],
    first_epochs: Sequence[int],
    bytes_by_key: Mapping[tuple[str, str], int],
    bytes_for_rows: int,
) -> list[Bundle]:
    """Put SAEs with equal training settings and first epoch together while their rows fit in memory.

    An SAE whose rows do not fit alone is a bundle of its own, to be streamed. The weights of an SAE do
    not depend on which others it is bundled with.
    """
    alike: dict[str, list[tuple[SaeJob, int]]] = {}
    for job, first_epoch in zip(jobs, first_epochs, strict=True):
        alike.setdefault(f"{first_epoch} {job.settings.model_dump_json()}", []).append((job, first_epoch))
    bundles: list[Bundle] = []
    for members in alike.values():
        first_epoch = members[0][1]
        together: list[SaeJob] = []
        for job, _ in members:
            if bytes_by_key[job.key] > bytes_for_rows:
                bundles.append(Bundle((job,), first_epoch, resident=False))
                continue
            keys = {one.key for one in [*together, job]}
            if sum(bytes_by_key[key] for key in keys) > bytes_for_rows:
                bundles.append(Bundle(tuple(together), first_epoch, resident=True))
                together = []
            together.append(job)
        if together:
            bundles.append(Bundle(tuple(together), first_epoch, resident=True))
    return bundles
