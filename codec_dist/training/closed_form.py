"""Baselines that are fitted in one pass over the rows, evaluated and saved like the SAEs that are trained."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from codec_dist.sae import FittedAutoencoder, SaeError, build
from codec_dist.training.co_training import Sweep
from codec_dist.training.collectives import Ranks
from codec_dist.training.held_out_metrics import evaluate
from codec_dist.training.parts import Parts
from codec_dist.training.rows import CALIBRATION_ROWS, LayerRows, epoch_batches
from codec_dist.training.sae_jobs import SaeJob, TrainingTask
from codec_dist.training.saving import LeftOut, save_finished, sign_of
from codec_dist.training.training_log import Note, RankLog


def fit_baselines(
    task: TrainingTask,
    sweep: Sweep,
    rows: LayerRows,
    whole: LayerRows,
    parts: Parts,
    ranks: Ranks,
    rank_log: RankLog | None,
    advance: Callable[[int], None],
) -> list[LeftOut]:
    """Fit each of a sweep on rank 0, send it to the others, and evaluate it together.

    ``rows`` are those that the ranks share out; ``whole`` are the same, none left to other ranks.

    Returns:
        Those that cannot be fitted to these rows; the same on every rank.
    """
    left_out = []
    for job in sweep.jobs:
        started = time.monotonic()
        sae = build(job.architecture, job.options, job.channels, seed=job.derived_seed("weights"))
        assert isinstance(sae, FittedAutoencoder)
        sae.to(ranks.device, getattr(torch, task.dtype))
        sae.sign = sign_of(job.quantity)
        calibration = rows.calibration()
        sae.calibrate(calibration.rows, calibration.scale, calibration.deviations)
        reason = None
        if ranks.rank == 0:
            try:
                sae.fit(_batches(whole, ranks.alone(), task.seed))
            except (SaeError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                reason = f"{job.label} cannot be fitted: {' '.join(str(error).split())}"
        reason, state = ranks.from_first((reason, {name: value.cpu() for name, value in sae.state_dict().items()}))
        if reason is None:
            sae.load_state_dict(state)
            _finish(task, job, sae, rows, parts, ranks, rank_log, started)
        else:
            left_out.append(LeftOut.of(job, reason))
        advance(1)
    return left_out


def _batches(rows: LayerRows, alone: Ranks, seed: int) -> Iterator[Tensor]:
    return (values for (values,), _ in epoch_batches([rows], alone, seed, 0, CALIBRATION_ROWS))


def _finish(
    task: TrainingTask,
    job: SaeJob,
    sae: FittedAutoencoder,
    rows: LayerRows,
    parts: Parts,
    ranks: Ranks,
    rank_log: RankLog | None,
    started: float,
) -> None:
    select, evaluated = (evaluate([sae], [rows], part, parts.classes, ranks)[0] for part in ("select", "evaluate"))
    if ranks.rank:
        return
    seconds, numbers = round(time.monotonic() - started, 3), select.numbers(task.correlation_threshold)
    history = [{"epoch": 1, "samples": rows.fit_rows, "seconds": seconds, **numbers}]
    training = {"epochs": 1, "fit_rows": rows.fit_rows, "rows_in_memory": rows.resident, "seconds": seconds}
    save_finished(task, job, sae, parts, select, evaluated, history, training)
    if rank_log:
        rank_log.enter([Note.of(job, 1, numbers, select)])
