"""The training of one group, from its first epoch or a resume state to finished SAEs on disk."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from codec_dist.sae import TrainedAutoencoder, build
from codec_dist.training.co_training import CoTrainingGroup, Key, Sweep
from codec_dist.training.collectives import Ranks
from codec_dist.training.errors import TrainingError
from codec_dist.training.held_out_metrics import Evaluation, evaluate, mean_losses
from codec_dist.training.optimizer import Lockstep, Unit, group_alike
from codec_dist.training.parts import Parts
from codec_dist.training.rows import LayerRows, epoch_batches
from codec_dist.training.sae_jobs import SaeJob, TrainingTask
from codec_dist.training.saving import (
    UNREADABLE,
    LeftOut,
    ResumeState,
    load_sweep,
    save_finished,
    save_sweep,
    sign_of,
)
from codec_dist.training.schedules import EarlyStop, Plateau, rate_factor
from codec_dist.training.training_log import Note, RankLog


@dataclass(eq=False)
class _Member:
    """One SAE of the group, and what its training remembers beside weights and moments."""

    job: SaeJob
    sweep: Sweep
    plateau: Plateau
    stop: EarlyStop
    loss: float = 0.0
    rows: int = 0
    """Training loss summed over so many rows, since the last evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds_before: float = 0.0


class GroupTraining:
    """Everything that advances together, on this rank. Rank 0 alone writes files and notes for the log.

    An SAE leaves when its epochs are over or its loss on the select part no longer falls; the others go on.
    """

    def __init__(
        self,
        task: TrainingTask,
        group: CoTrainingGroup,
        rows: Mapping[Key, LayerRows],
        parts: Parts,
        ranks: Ranks,
        rank_log: RankLog | None,
    ) -> None:
        self._task, self._group, self._rows, self._parts = task, group, rows, parts
        self._ranks, self._rank_log = ranks, rank_log
        self._settings = group.jobs[0].settings
        # Ranks that divide dictionaries see the same rows, so each evaluates by itself.
        self._sharers = ranks.alone() if self._settings.divide else ranks
        self._epoch = group.sweeps[0].first_epoch
        self.left_out: list[LeftOut] = []
        """SAEs that diverged; the same on every rank."""
        self._fit_rows = rows[group.jobs[0].key].fit_rows
        self._started = time.monotonic()
        # Of the last epoch, evaluations left out.
        self._speed = 0.0
        states = {identity: state for sweep in group.sweeps for identity, state in self._load(sweep).items()}
        self._members = [_member(job, sweep, states.get(job.identity)) for sweep in group.sweeps for job in sweep.jobs]
        saes = [self._start(member, states.get(member.job.identity)) for member in self._members]
        self._arrange(saes, [states[member.job.identity].adam for member in self._members] if states else None)

    def run(self, advance: Callable[[int], None]) -> None:
        """Train to the end and save; ``advance`` is called with every SAE epoch.

        An SAE whose loss or weights are not finite is left out, and the others go on.
        """
        with _tensor_floats(self._settings.precision == "tf32"):
            while self._members:
                self._train_epoch()
                self._epoch += 1
                self._watch_losses()
                members = len(self._members)
                leaving = [member for member in self._members if self._is_over(member)]
                looked_at = [member for member in self._members if member in leaving or self._is_looked_at(member)]
                if looked_at:
                    leaving = self._look_at(looked_at, leaving)
                skipped = sum(member.job.epochs - self._epoch for member in leaving)
                self._save_resume_states(leaving)
                advance(members + skipped)
        if self._ranks.rank == 0:
            for sweep in self._group.sweeps:
                sweep.state.unlink(missing_ok=True)

    # ---- beginning, and beginning again

    def _load(self, sweep: Sweep) -> dict[str, ResumeState]:
        if sweep.saved is None:
            return {}
        path = sweep.saved.path
        try:
            epoch, states = load_sweep(path)
        except FileNotFoundError:
            epoch, states = -1, {}
        except UNREADABLE as error:
            raise TrainingError(
                f"the resume state {path} is damaged ({error}): remove it, and its SAEs are trained from the start"
            ) from error
        if epoch != sweep.first_epoch or any(job.identity not in states for job in sweep.jobs):
            raise TrainingError(
                f"rank {self._ranks.rank} does not find the resume state after epoch {sweep.first_epoch} in {path}: "
                "put run.directory where all nodes see it"
            )
        return {job.identity: states[job.identity] for job in sweep.jobs}

    def _start(self, member: _Member, state: ResumeState | None) -> TrainedAutoencoder:
        """The SAE as it was saved, or at its beginning; one that is to be divided on the CPU."""
        job = member.job
        sae = build(job.architecture, job.options, job.channels, seed=job.derived_seed("weights"))
        assert isinstance(sae, TrainedAutoencoder)
        divided = self._settings.divide and self._ranks.size > 1
        device = torch.device("cpu") if divided else self._ranks.device
        sae.to(device, getattr(torch, self._task.dtype))
        sae.sign = sign_of(job.quantity)
        sae.train()
        if state is None:
            calibration = self._rows[job.key].calibration()
            sae.calibrate(calibration.rows.to(device), calibration.scale, calibration.deviations.to(device))
            return sae
        try:
            sae.load_state_dict(state.model)
        except RuntimeError as error:
            raise TrainingError(
                f"the resume state of {job.label} holds no {job.architecture} of {job.channels} channels and "
                f"{sae.modes} modes: remove {self._path_of(member)} to train from the start"
            ) from error
        sae.scale = state.scale
        return sae

    def _path_of(self, member: _Member) -> Path:
        assert member.sweep.saved is not None
        return member.sweep.saved.path

    def _arrange(
        self, saes: Sequence[TrainedAutoencoder], adam_states: Sequence[dict[str, torch.Tensor]] | None
    ) -> None:
        """Let the members advance in lockstep, and as few computations as can be; ``saes`` are theirs, whole."""
        jobs = [member.job for member in self._members]
        # SAEs of different length have their last resampling at different times.
        kinds = [(member.sweep.state, member.job.epochs) for member in self._members]
        self._lockstep = Lockstep(
            saes,
            [job.settings.learning_rate for job in jobs],
            self._ranks,
            stacks=group_alike(saes, kinds),
            clips=[job.settings.gradient_clip for job in jobs],
            autocast=self._settings.precision == "bfloat16",
            divide=self._settings.divide,
        )
        if adam_states is not None:
            self._lockstep.load_states(adam_states)
        self._unit_rows = [self._rows[jobs[unit.numbers[0]].key] for unit in self._lockstep.units]

    # ---- an epoch

    def _train_epoch(self) -> None:
        seeds = [member.job.derived_seed("noise", self._epoch, self._sharers.rank) for member in self._members]
        self._lockstep.seed_noise(seeds)
        started, seen, before = time.monotonic(), 0, self._epoch * self._fit_rows
        batches = epoch_batches(self._unit_rows, self._sharers, self._task.seed, self._epoch, self._settings.batch_size)
        for shares, rows in batches:
            self._set_rates(self._epoch + seen / self._fit_rows)
            self._lockstep.step(shares, rows)
            for unit in self._lockstep.units:
                self._resample(unit, before + seen, before + seen + rows)
            seen += rows
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._speed = round(seen / max(time.monotonic() - started, 1e-9), 1)

    def _set_rates(self, epochs: float) -> None:
        factors = []
        for member in self._members:
            settings = member.job.settings
            factor = rate_factor(settings.schedule, epochs / settings.epochs, settings.warmup)
            factors.append(factor * member.plateau.factor)
        self._lockstep.set_rates(factors)

    def _resample(self, unit: Unit, before: int, samples: int) -> None:
        """Reinitialise dead modes where a multiple of ``resample_every`` samples was passed.

        Not so late that less than as many samples are left: a mode that was just reinitialised is worse than none.
        """
        every = unit.template.settings.resample_every
        jobs = [self._members[number].job for number in unit.numbers]
        if every is None or samples // every == before // every or samples + every > jobs[0].epochs * self._fit_rows:
            return
        rows = self._rows[jobs[0].key].calibration().rows
        self._lockstep.resample(unit, rows, [job.derived_seed("resample", samples // every) for job in jobs])

    def _watch_losses(self) -> None:
        settings = [member.job.settings for member in self._members]
        if not any(item.schedule == "plateau" or item.early_stop is not None for item in settings):
            return
        losses = mean_losses(self._lockstep.units, self._unit_rows, "select", self._sharers)
        for member, loss in zip(self._members, losses, strict=True):
            if member.job.settings.schedule == "plateau":
                member.plateau.update(loss)
            member.stop.update(loss)

    def _is_over(self, member: _Member) -> bool:
        return self._epoch == member.job.epochs or member.stop.due

    def _is_looked_at(self, member: _Member) -> bool:
        return self._epoch in spread_over(member.job.epochs, self._task.evaluations)

    # ---- looking and saving

    def _look_at(self, looked_at: Sequence[_Member], leaving: Sequence[_Member]) -> list[_Member]:
        """Evaluate, save those that are done, leave out those that diverged; returns all that are gone."""
        saes = self._lockstep.saes()
        self._take_losses()
        diverged = [member for member, sae in zip(self._members, saes, strict=True) if not _is_finite(member, sae)]
        self.left_out += [LeftOut.of(member.job, self._divergence(member)) for member in diverged]
        done = [member for member in leaving if member not in diverged]
        found = self._evaluate([member for member in looked_at if member not in diverged], saes)
        if done or diverged:
            self._part_with(done, diverged, found, saes)
        return [*done, *diverged]

    def _evaluate(self, members: Sequence[_Member], saes: Sequence[TrainedAutoencoder]) -> dict[_Member, Evaluation]:
        """Evaluate ``members`` on the select part, write histories and log; ``saes`` are those of all members."""
        if not members:
            return {}
        found = dict(zip(members, self._evaluations(members, saes, "select"), strict=True))
        notes = []
        for member, evaluation in found.items():
            rate = self._lockstep.rates[self._members.index(member)]
            numbers = {"loss": member.loss / member.rows, "learning_rate": rate, "samples_per_second": self._speed}
            numbers |= self._numbers(evaluation)
            member.loss, member.rows = 0.0, 0
            entry = {"epoch": self._epoch, "samples": self._epoch * self._fit_rows, "seconds": self._seconds(member)}
            member.history.append(entry | numbers)
            notes.append(Note.of(member.job, self._epoch, numbers, evaluation))
        if self._rank_log:
            self._rank_log.enter(notes)
        return found

    def _take_losses(self) -> None:
        losses, rows = self._lockstep.pop_losses()
        for member, loss in zip(self._members, losses, strict=True):
            member.loss += loss
            member.rows += rows

    def _divergence(self, member: _Member) -> str:
        return (
            f"{member.job.label} diverged by epoch {self._epoch} (loss {member.loss / member.rows:g}): "
            f"lower its learning_rate ({member.job.settings.learning_rate:g})"
        )

    def _part_with(
        self,
        leaving: Sequence[_Member],
        diverged: Sequence[_Member],
        selected: Mapping[_Member, Evaluation],
        saes: Sequence[TrainedAutoencoder],
    ) -> None:
        """Save those that are done, and arrange the rest again."""
        states = self._lockstep.states()
        evaluated = self._evaluations(leaving, saes, "evaluate") if leaving else []
        by_member = dict(zip(self._members, saes, strict=True))
        for member, evaluation in zip(leaving, evaluated, strict=True):
            if self._ranks.rank == 0:
                training = {
                    "epochs": self._epoch,
                    "fit_rows": self._fit_rows,
                    "rows_in_memory": self._group.resident,
                    "seconds": self._seconds(member),
                }
                results = (selected[member], evaluation, member.history, training)
                save_finished(self._task, member.job, by_member[member], self._parts, *results)
        # Its memory is needed by the next one.
        del self._lockstep
        pairs = [pair for pair in zip(self._members, states, strict=True) if pair[0] not in [*leaving, *diverged]]
        self._members = [member for member, _ in pairs]
        if self._members:
            self._arrange([by_member[member] for member in self._members], [state for _, state in pairs])

    def _save_resume_states(self, left: Sequence[_Member]) -> None:
        """Where it is time, or some have ``left``: the others' arithmetic in a stack depends on when."""
        remaining = {member.sweep.state for member in self._members}
        left_behind = {member.sweep.state for member in left} & remaining
        due = [sweep for sweep in self._group.sweeps if sweep.state in left_behind or self._is_to_be_saved(sweep)]
        if not due:
            return
        self._take_losses()
        # On all ranks, which put divided dictionaries together for it.
        saes, adam_states = self._lockstep.saes(), self._lockstep.states()
        if self._ranks.rank:
            return
        for sweep in due:
            states = {
                member.job.identity: ResumeState(
                    scale=float(sae.scale),
                    model=sae.state_dict(),
                    adam=adam,
                    plateau=member.plateau,
                    stop=member.stop,
                    loss=member.loss,
                    rows=member.rows,
                    history=member.history,
                    seconds=self._seconds(member),
                )
                for member, sae, adam in zip(self._members, saes, adam_states, strict=True)
                if member.sweep is sweep
            }
            save_sweep(sweep.state, self._epoch, states)

    def _is_to_be_saved(self, sweep: Sweep) -> bool:
        epochs = {member.job.epochs for member in self._members if member.sweep is sweep}
        return any(self._epoch in spread_over(longest, self._task.checkpoints + 1) for longest in epochs)

    def _evaluations(
        self, members: Sequence[_Member], saes: Sequence[TrainedAutoencoder], part: str
    ) -> list[Evaluation]:
        places = [self._members.index(member) for member in members]
        coders = self._lockstep.coders(saes)
        rows = [self._rows[member.job.key] for member in members]
        subset, their_coders = [saes[place] for place in places], [coders[place] for place in places]
        return evaluate(subset, rows, part, self._parts.classes, self._sharers, their_coders)

    def _numbers(self, evaluation: Evaluation) -> dict[str, float]:
        return evaluation.numbers(self._task.correlation_threshold)

    def _seconds(self, member: _Member) -> float:
        return round(member.seconds_before + time.monotonic() - self._started, 3)


def _is_finite(member: _Member, sae: TrainedAutoencoder) -> bool:
    return math.isfinite(member.loss) and all(bool(weights.isfinite().all()) for weights in sae.parameters())


def _member(job: SaeJob, sweep: Sweep, state: ResumeState | None) -> _Member:
    if state is None:
        return _Member(job, sweep, Plateau(job.settings.patience), EarlyStop(job.settings.early_stop))
    return _Member(job, sweep, state.plateau, state.stop, state.loss, state.rows, state.history, state.seconds)


def spread_over(epochs: int, times: int) -> set[int]:
    """``times`` epochs (counted from 1), evenly spread, the last among them; all where there are fewer."""
    return {math.ceil(epochs * number / times) for number in range(1, times + 1)}


@contextmanager
def _tensor_floats(enabled: bool) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in TF32 for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
