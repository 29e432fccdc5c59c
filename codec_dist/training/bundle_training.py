"""The training of one bundle, from its first epoch or a resume state to finished SAEs on disk."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from codec_dist.sae import SparseAutoencoder, build
from codec_dist.training.bundles import Bundle
from codec_dist.training.errors import TrainingError
from codec_dist.training.evaluation import Evaluation, evaluate, mean_losses
from codec_dist.training.lockstep import Lockstep
from codec_dist.training.logbook import Logbook
from codec_dist.training.parts import Parts
from codec_dist.training.plan import SaeJob
from codec_dist.training.ranks import Ranks
from codec_dist.training.resume import ResumeState, clear_resume_state, load_resume_state, save_resume_state
from codec_dist.training.rows import LayerRows, epoch_batches
from codec_dist.training.schedules import Plateau, rate_factor
from codec_dist.training.task import TrainingTask
from codec_dist.utils import write_bytes_atomically, write_json_atomically


class BundleTraining:
    """Everything that advances together, on this rank. Rank 0 alone writes files and logs."""

    def __init__(
        self,
        task: TrainingTask,
        bundle: Bundle,
        rows: Sequence[LayerRows],
        parts: Parts,
        ranks: Ranks,
        logbook: Logbook | None,
    ) -> None:
        self._task, self._jobs, self._rows, self._parts = task, bundle.jobs, list(rows), parts
        self._ranks, self._logbook, self._epoch = ranks, logbook, bundle.first_epoch
        self._settings = bundle.jobs[0].settings
        self._fit_rows = rows[0].fit_rows
        self._started = time.monotonic()
        states = [self._resume_state(job) for job in self._jobs]
        self._saes = [
            self._start(job, layer_rows, state) for job, layer_rows, state in zip(self._jobs, rows, states, strict=True)
        ]
        self._lockstep = Lockstep(self._saes, self._settings.learning_rate, ranks)
        for number, state in enumerate(states):
            if state is not None:
                self._lockstep.load_state(number, state.adam)
        fresh = Plateau(self._settings.patience)
        self._plateaus = [state.plateau if state else Plateau(fresh.patience) for state in states]
        self._histories = [state.history if state else [] for state in states]
        self._seconds_before = [state.seconds if state else 0.0 for state in states]
        # Since the last evaluation.
        self._samples, self._sample_seconds = 0, 0.0

    def run(self, advance: Callable[[int], None]) -> None:
        """Train to the end and save; ``advance`` is told of every SAE epoch.

        Raises:
            TrainingError: a loss that is not finite.
        """
        epochs = self._settings.epochs
        to_evaluate = spread_over(epochs, self._task.evaluations)
        to_save = spread_over(epochs, self._task.checkpoints + 1) - {epochs}
        while self._epoch < epochs:
            self._train_epoch()
            self._epoch += 1
            if self._settings.schedule == "plateau":
                for plateau, loss in zip(self._plateaus, self._select_losses(), strict=True):
                    plateau.update(loss)
            if self._epoch in to_evaluate:
                self._evaluate()
            if self._epoch in to_save:
                self._save_resume_states()
            advance(len(self._jobs))
        self._finish()

    def _resume_state(self, job: SaeJob) -> ResumeState | None:
        if not self._epoch:
            return None
        state = load_resume_state(self._task.folder(job))
        if state is None or state.epoch != self._epoch:
            raise TrainingError(
                f"rank {self._ranks.rank} does not find the resume state of {job.label} after epoch {self._epoch} in "
                f"{self._task.folder(job)}: put run.directory where all nodes see it"
            )
        return state

    def _start(self, job: SaeJob, rows: LayerRows, state: ResumeState | None) -> SparseAutoencoder:
        sae = build(job.architecture, job.options, job.channels, seed=job.derived_seed("weights"))
        sae.to(self._ranks.device, getattr(torch, self._task.dtype))
        if state is not None:
            sae.load_state_dict(state.model)
            sae.scale = state.scale
        else:
            calibration = rows.calibration()
            sae.calibrate(calibration.rows, calibration.scale)
        return sae.train()

    def _train_epoch(self) -> None:
        for job, sae in zip(self._jobs, self._saes, strict=True):
            sae.seed_noise(job.derived_seed("noise", self._epoch, self._ranks.rank))
        started, seen = time.monotonic(), 0
        size = self._settings.batch_size
        for batches, rows in epoch_batches(self._rows, self._ranks, self._task.seed, self._epoch, size):
            self._set_rates((self._epoch + seen / self._fit_rows) / self._settings.epochs)
            self._lockstep.step(batches, rows)
            seen += rows
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._samples += seen
        self._sample_seconds += time.monotonic() - started

    def _set_rates(self, progress: float) -> None:
        factor = rate_factor(self._settings.schedule, progress, self._settings.warmup_fraction)
        self._lockstep.set_rates([factor * plateau.factor for plateau in self._plateaus])

    def _select_losses(self) -> list[float]:
        return mean_losses(self._saes, self._rows, "select", self._ranks)

    def _evaluate(self) -> None:
        losses = self._lockstep.pop_losses()
        for job, sae, loss in zip(self._jobs, self._saes, losses, strict=True):
            if not (math.isfinite(loss) and all(weights.isfinite().all() for weights in sae.parameters())):
                raise TrainingError(
                    f"{job.label} diverged by epoch {self._epoch} (loss {loss:g}): "
                    f"lower its learning_rate ({self._settings.learning_rate:g})"
                )
        rate = round(self._samples / max(self._sample_seconds, 1e-9), 1)
        self._samples, self._sample_seconds = 0, 0.0
        found = self._evaluations("select")
        for number, (loss, evaluation) in enumerate(zip(losses, found, strict=True)):
            numbers = {"loss": loss, "learning_rate": self._lockstep.rates[number], "samples_per_second": rate}
            numbers |= self._numbers(evaluation)
            entry = {"epoch": self._epoch, "samples": self._epoch * self._fit_rows, "seconds": self._seconds(number)}
            self._histories[number].append(entry | numbers)
            if self._logbook:
                self._logbook.evaluation(self._jobs[number], self._epoch, numbers, evaluation)
        if self._logbook:
            self._logbook.top_modes(self._epoch, dict(zip(self._jobs, found, strict=True)))

    def _finish(self) -> None:
        """Save weights, history and, last, the metrics that mark an SAE as finished."""
        select, evaluated = self._evaluations("select"), self._evaluations("evaluate")
        for sae in self._saes:
            sae.eval()
        if self._ranks.rank:
            return
        for number, (job, sae) in enumerate(zip(self._jobs, self._saes, strict=True)):
            folder = self._task.folder(job)
            training = {"epochs": self._settings.epochs, "fit_rows": self._fit_rows, "seconds": self._seconds(number)}
            sae.save(folder, details=self._details(job))
            lines = "".join(json.dumps(entry) + "\n" for entry in self._histories[number])
            write_bytes_atomically(folder / "history.jsonl", lines.encode())
            metrics = {"layer": job.layer, "quantity": job.quantity, "architecture": job.architecture}
            parts = {"select": self._summary(select[number]), "evaluate": self._summary(evaluated[number])}
            write_json_atomically(folder / "metrics.json", metrics | parts | {"training": training})
            clear_resume_state(folder)

    def _save_resume_states(self) -> None:
        if self._ranks.rank:
            return
        for number, (job, sae) in enumerate(zip(self._jobs, self._saes, strict=True)):
            state = ResumeState(
                epoch=self._epoch,
                scale=sae.scale,
                model=sae.state_dict(),
                adam=self._lockstep.state(number),
                plateau=self._plateaus[number],
                history=self._histories[number],
                seconds=self._seconds(number),
            )
            save_resume_state(self._task.folder(job), state)

    def _evaluations(self, part: str) -> list[Evaluation]:
        return evaluate(self._saes, self._rows, part, self._parts.classes, self._ranks)

    def _details(self, job: SaeJob) -> dict[str, Any]:
        return {
            "layer": job.layer,
            "quantity": job.quantity,
            "seed": job.seed,
            "digest": job.digest,
            "training": job.settings.model_dump(mode="json"),
            "split": self._parts.split_hash,
            "fit_rows": self._fit_rows,
        }

    def _numbers(self, evaluation: Evaluation) -> dict[str, float]:
        return evaluation.numbers(self._task.correlation_threshold)

    def _summary(self, evaluation: Evaluation) -> dict[str, Any]:
        return evaluation.report.as_dict() | self._numbers(evaluation)

    def _seconds(self, number: int) -> float:
        return round(self._seconds_before[number] + time.monotonic() - self._started, 3)


def spread_over(epochs: int, times: int) -> set[int]:
    """``times`` epochs (counted from 1), evenly spread, the last among them; all where there are fewer."""
    return {math.ceil(epochs * number / times) for number in range(1, times + 1)}
