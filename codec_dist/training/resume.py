"""States from which a killed training goes on as if nothing had happened."""

import io
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec_dist.training.schedules import Plateau
from codec_dist.utils import write_bytes_atomically

FILE = "resume.pt"
FORMAT = 1


@dataclass
class ResumeState:
    """All that the epochs after ``epoch`` depend on.

    No state of a random generator: every epoch's randomness is a pure function of the SAE's seed, the
    epoch and the rank.
    """

    epoch: int
    """Epochs that are done."""
    scale: float
    model: dict[str, Tensor]
    adam: dict[str, Tensor]
    plateau: Plateau
    history: list[dict[str, Any]]
    """Evaluations so far."""
    seconds: float
    """Time spent so far."""


def save_resume_state(folder: Path, state: ResumeState) -> None:
    """Write the state, whole or not at all, as tensors and plain values."""
    content = io.BytesIO()
    plain: dict[str, Any] = {"format": FORMAT, "epoch": state.epoch, "scale": state.scale, "seconds": state.seconds}
    plain |= {"plateau": asdict(state.plateau), "history": json.dumps(state.history)}
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.model.items()}
    torch.save({**plain, "model": tensors, "adam": state.adam}, content)
    write_bytes_atomically(folder / FILE, content.getvalue())


def load_resume_state(folder: Path) -> ResumeState | None:
    """The state in ``folder``; None if there is none, or one that cannot be used (training then starts anew)."""
    try:
        found = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        if found.pop("format") != FORMAT:
            return None
        history, plateau = json.loads(found.pop("history")), Plateau(**found.pop("plateau"))
        return ResumeState(history=history, plateau=plateau, **found)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError):
        return None


def epochs_done(folder: Path) -> int:
    """Epochs after which a training in ``folder`` goes on; 0 without a usable state."""
    state = load_resume_state(folder)
    return state.epoch if state else 0


def clear_resume_state(folder: Path) -> None:
    """Remove the state of an SAE that is finished."""
    (folder / FILE).unlink(missing_ok=True)
