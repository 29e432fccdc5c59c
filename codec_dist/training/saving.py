"""What training leaves on disk: states to resume from, finished SAEs, and the list of those left out."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from codec_dist.sae import SparseAutoencoder
from codec_dist.training.held_out_metrics import Evaluation
from codec_dist.training.parts import Parts
from codec_dist.training.sae_jobs import SaeJob, TrainingTask
from codec_dist.training.schedules import EarlyStop, Plateau
from codec_dist.utils import hash_json, read_json, write_atomically, write_bytes_atomically, write_json_atomically

RESUME_FILES = "resume-*.safetensors"
FORMAT = 2
HASH_DIGITS = 12
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError)
"""What a missing, damaged or unexpected file makes of an attempt to read it."""

LEFT_OUT_FILE = "left_out.json"
NAMED_REASONS = 5


@dataclass
class ResumeState:
    """All that the epochs after the saved one depend on, of one SAE.

    No state of a random generator and no count of samples: the noise, the order of rows and the times of
    resampling are pure functions of the SAE's seed, the epoch and the rank.
    """

    scale: float
    model: dict[str, Tensor]
    """Parameters and buffers (among them the samples since each mode fired, and running thresholds)."""
    adam: dict[str, Tensor]
    plateau: Plateau
    stop: EarlyStop
    loss: float
    """Sum of the training loss over rows since the last evaluation."""
    rows: int
    """How many these are."""
    history: list[dict[str, Any]]
    """Evaluations so far."""
    seconds: float
    """Time spent so far."""


@dataclass(frozen=True)
class SavedSweep:
    """What the header of a file says: which SAEs it is about, and after which epoch."""

    path: Path
    epoch: int
    identities: tuple[str, ...]


def state_path(folder: Path, identities: Sequence[str]) -> Path:
    """Where the state of SAEs that advance together is kept, in the folder of their layer and quantity."""
    return folder / RESUME_FILES.replace("*", hash_json(list(identities))[:HASH_DIGITS])


def save_sweep(path: Path, epoch: int, states: Mapping[str, ResumeState]) -> None:
    """Write the states of SAEs that advance together, by identity, in one file: all or none.

    ``adam`` of a state must own its memory, as :meth:`Lockstep.states` gives it.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    saes: list[dict[str, Any]] = []
    for number, (identity, state) in enumerate(states.items()):
        # Copies, because parameters may be views into one buffer, which safetensors refuses; moments are copies.
        model = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.model.items()}
        for kind, named in (("model", model), ("adam", state.adam)):
            tensors |= {f"{number}.{kind}.{name}": tensor for name, tensor in named.items()}
        plain = {name: getattr(state, name) for name in ("scale", "loss", "rows", "history", "seconds")}
        saes.append({"identity": identity, **plain, "plateau": asdict(state.plateau), "stop": asdict(state.stop)})
    header = {"format": str(FORMAT), "epoch": str(epoch), "saes": json.dumps(saes)}
    try:
        write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, header))
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def find_sweeps(folder: Path) -> list[SavedSweep]:
    """The usable states in a folder; a damaged one counts as none, and its SAEs start again."""
    return [state for _, state in _look_into(folder) if state is not None]


def damaged_states(folder: Path) -> list[Path]:
    """The states in a folder that cannot be used."""
    return [path for path, state in _look_into(folder) if state is None]


def _look_into(folder: Path) -> Iterator[tuple[Path, SavedSweep | None]]:
    for path in sorted(folder.glob(RESUME_FILES)):
        try:
            with safe_open(path, "pt") as file:
                epoch, saes = _header(file.metadata())
                state = SavedSweep(path, epoch, tuple(sae["identity"] for sae in saes))
        except UNREADABLE:
            yield path, None
        else:
            yield path, state


def load_sweep(path: Path) -> tuple[int, dict[str, ResumeState]]:
    """Epochs that are done, and the states by identity.

    Raises:
        UNREADABLE: a file that is missing or damaged.
    """
    with safe_open(path, "pt") as file:
        epoch, saes = _header(file.metadata())
        names = list(file.keys())
        states: dict[str, ResumeState] = {}
        for number, plain in enumerate(saes):
            model, adam = (_tensors(file, names, f"{number}.{kind}.") for kind in ("model", "adam"))
            plateau, stop = Plateau(**plain.pop("plateau")), EarlyStop(**plain.pop("stop"))
            identity = plain.pop("identity")
            states[identity] = ResumeState(model=model, adam=adam, plateau=plateau, stop=stop, **plain)
    return epoch, states


def remove_ended_states(folder: Path, is_finished: Callable[[Path], bool]) -> None:
    """Remove the states in a folder of which every SAE is finished; those of other configs are kept.

    Also what a writer that was killed has left in parts, so nobody may be writing.
    """
    for left in (*folder.glob(f".{RESUME_FILES}.*.partial"), *folder.glob(".tmp*")):
        left.unlink(missing_ok=True)
    for state in find_sweeps(folder):
        if all(is_finished(folder / identity) for identity in state.identities):
            state.path.unlink(missing_ok=True)


def _tensors(file: Any, names: Sequence[str], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): file.get_tensor(name) for name in names if name.startswith(start)}


def _header(metadata: Mapping[str, str]) -> tuple[int, list[dict[str, Any]]]:
    if int(metadata["format"]) != FORMAT:
        raise ValueError(f"a state of format {metadata['format']}")
    return int(metadata["epoch"]), json.loads(metadata["saes"])


# ---- Finished SAEs


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
        "grid": dict(job.grid_values),
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


# ---- SAEs that could not be trained, which leave the others alone


@dataclass(frozen=True)
class LeftOut:
    """An SAE that was asked for and could not be trained."""

    layer: str
    quantity: str
    architecture: str
    folder: str
    """Where it would be, relative to the run's ``sae`` folder."""
    reason: str
    """One sentence."""

    @classmethod
    def of(cls, job: SaeJob, reason: str) -> "LeftOut":
        """An SAE with the reason why it is left out."""
        return cls(job.layer, job.quantity, job.architecture, job.folder.as_posix(), reason)


def write_left_out(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write ``left_out.json``, also where nothing is left out."""
    write_json_atomically(folder / LEFT_OUT_FILE, [asdict(item) for item in left_out])


def read_left_out(folder: Path) -> list[LeftOut]:
    """What :func:`write_left_out` wrote; nothing where there is no such file or it cannot be read."""
    try:
        rows: Any = read_json(folder / LEFT_OUT_FILE)
        return [LeftOut(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def tell_left_out(left_out: Sequence[LeftOut]) -> None:
    """One line for each reason, of which one layer and quantity may have several SAEs."""
    reasons = list(dict.fromkeys(item.reason for item in left_out))
    for reason in reasons[:NAMED_REASONS]:
        count = sum(item.reason == reason for item in left_out)
        sys.stderr.write(f"train: {count:,} SAE{'s' * (count != 1)} left out, the others are trained: {reason}\n")
    if len(reasons) > NAMED_REASONS:
        more = sum(item.reason in reasons[NAMED_REASONS:] for item in left_out)
        sys.stderr.write(f"train: {more:,} more SAEs left out, see sae/{LEFT_OUT_FILE}\n")
