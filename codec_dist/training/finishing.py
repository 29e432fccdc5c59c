"""What a finished SAE leaves on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codec_dist.sae import SparseAutoencoder
from codec_dist.training.held_out_metrics import Evaluation
from codec_dist.training.parts import Parts
from codec_dist.training.sae_jobs import SaeJob
from codec_dist.training.task import TrainingTask
from codec_dist.utils import write_bytes_atomically, write_json_atomically


def save_finished(
    task: TrainingTask,
    job: SaeJob,
    sae: SparseAutoencoder,
    parts: Parts,
    select: Evaluation,
    evaluate: Evaluation,
    history: Sequence[dict[str, Any]],
    training: dict[str, Any],
) -> Path:
    """Write weights, history and, last, the metrics that mark an SAE as finished; its folder."""
    folder = task.folder(job)
    details = {
        "layer": job.layer,
        "quantity": job.quantity,
        "seed": job.seed,
        "digest": job.digest,
        "grid": dict(job.chosen),
        "training": job.settings.model_dump(mode="json"),
        "split": parts.split_hash,
        "fit_rows": training["fit_rows"],
    }
    sae.eval().save(folder, details=details)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_bytes_atomically(folder / "history.jsonl", lines.encode())
    metrics: dict[str, Any] = {"layer": job.layer, "quantity": job.quantity, "architecture": job.architecture}
    for part, evaluation in (("select", select), ("evaluate", evaluate)):
        metrics[part] = evaluation.report.as_dict() | evaluation.numbers(task.correlation_threshold)
    write_json_atomically(folder / "metrics.json", metrics | {"training": training})
    return folder


def sign_of(quantity: str) -> Any:
    """The sign of a quantity's rows, as ``SparseAutoencoder.sign`` has it."""
    return quantity.rpartition("-")[2]
