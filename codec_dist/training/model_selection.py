"""Which of a run's SAEs later stages use: their stability over seeds, the choice, and the files that say why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec_dist.config import SelectionSettings
from codec_dist.modes import STABILITY_FILE, read_stability, stability_over_seeds, write_stability
from codec_dist.sae import ARCHITECTURES, FittedAutoencoder, SparseAutoencoder
from codec_dist.training.choice import Candidate, choose
from codec_dist.training.errors import TrainingError
from codec_dist.utils import hash_file, read_json, write_json_atomically


def select_saes(
    sae_folder: Path, folders: Sequence[Path], settings: SelectionSettings | None = None
) -> dict[tuple[str, str], Path]:
    """Choose one of the finished SAEs in ``folders`` for each layer and quantity; :func:`choose` has the rule.

    Writes, below ``sae_folder``: ``stability.json`` into the folder of every SAE that has other seeds,
    ``selection.json`` (criterion, candidates, choices with their reasons) and ``selected.json`` (layer →
    quantity → folder). May be called again at any time, with another criterion; dictionaries whose weights
    did not change are not compared again.

    Args:
        sae_folder: the run's ``sae`` folder.
        folders: SAEs below it, ``<layer>/<quantity>/<hash>-s<seed>``.
        settings: the criterion; default: the defaults of ``sae.selection``.

    Returns:
        The chosen folder of each (layer, quantity).

    Raises:
        TrainingError: an SAE that is not finished or whose metrics cannot be read. SaeError: unreadable weights.
    """
    settings = settings or SelectionSettings()
    sae_folder = Path(sae_folder)
    metrics = {Path(folder): _read_metrics(Path(folder)) for folder in folders}
    candidates = [_candidate(sae_folder, folder, values) for folder, values in metrics.items()]
    stability = _compare_seeds(sae_folder, candidates, metrics)
    candidates = [replace(one, stability=stability.get(one.folder)) for one in candidates]
    decisions = choose(candidates, settings)
    chosen = {decision.candidate.key: decision for decision in decisions}
    table = [
        {**_row(one), "selected": chosen[one.key].candidate is one}
        for one in sorted(candidates, key=_order(candidates))
    ]
    reasons = [
        {"layer": layer, "quantity": quantity, "folder": decision.candidate.folder, "reason": decision.reason}
        for (layer, quantity), decision in chosen.items()
    ]
    content = {"criterion": settings.model_dump(mode="json"), "choices": reasons, "saes": table}
    write_json_atomically(sae_folder / "selection.json", content)
    selected: dict[str, dict[str, str]] = {}
    for (layer, quantity), decision in chosen.items():
        selected.setdefault(layer, {})[quantity] = decision.candidate.folder
    write_json_atomically(sae_folder / "selected.json", selected)
    return {key: sae_folder / decision.candidate.folder for key, decision in chosen.items()}


def _read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
        names = {"ev", "l0", "dead_fraction", "frequency"}
        if not (names <= metrics["select"].keys() and {"layer", "quantity", "architecture"} <= metrics.keys()):
            raise KeyError("select")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"cannot read the metrics in {folder} ({error!r}): remove it, train again") from error
    return metrics


def _candidate(sae_folder: Path, folder: Path, metrics: Mapping[str, Any]) -> Candidate:
    select = metrics["select"]
    ev, l0, dead = (math.nan if select[name] is None else float(select[name]) for name in ("ev", "l0", "dead_fraction"))
    return Candidate(
        folder=folder.relative_to(sae_folder).as_posix(),
        layer=str(metrics["layer"]),
        quantity=str(metrics["quantity"]),
        architecture=str(metrics["architecture"]),
        ev=ev,
        l0=l0,
        dead_fraction=dead,
        baseline=_is_baseline(str(metrics["architecture"])),
    )


def _is_baseline(architecture: str) -> bool:
    factory = ARCHITECTURES.factory(architecture)
    return isinstance(factory, type) and issubclass(factory, FittedAutoencoder)


def _compare_seeds(
    sae_folder: Path, candidates: Sequence[Candidate], metrics: Mapping[Path, Mapping[str, Any]]
) -> dict[str, float]:
    """The median stability of the living modes of each SAE that has other seeds, by folder."""
    configurations: dict[str, list[Candidate]] = {}
    for one in candidates:
        configurations.setdefault(one.configuration, []).append(one)
    medians: dict[str, float] = {}
    for seeds in configurations.values():
        folders = [sae_folder / one.folder for one in seeds]
        if len(seeds) == 1:
            # What an earlier plan with more seeds left says nothing about this one.
            (folders[0] / STABILITY_FILE).unlink(missing_ok=True)
            continue
        for folder, modes in zip(folders, _stability(folders, metrics), strict=True):
            living = modes[~modes.isnan()]
            medians[folder.relative_to(sae_folder).as_posix()] = float(living.median()) if len(living) else 0.0
    return medians


def _stability(folders: Sequence[Path], metrics: Mapping[Path, Mapping[str, Any]]) -> list[Tensor]:
    compared = {folder.name: hash_file(folder / "model.safetensors") for folder in folders}
    known = [read_stability(folder, compared) for folder in folders]
    if all(one is not None for one in known):
        return [one for one in known if one is not None]
    dictionaries = [SparseAutoencoder.load(folder).dictionary.cpu() for folder in folders]
    alive = [torch.tensor(metrics[folder]["select"]["frequency"]) > 0 for folder in folders]
    found = stability_over_seeds(dictionaries, alive)
    for folder, modes in zip(folders, found, strict=True):
        write_stability(folder, modes, compared)
    return found


def _row(one: Candidate) -> dict[str, Any]:
    numbers = {"ev": one.ev, "l0": one.l0, "dead_fraction": one.dead_fraction, "stability": one.stability}
    known = {name: None if value is None or math.isnan(value) else value for name, value in numbers.items()}
    place = {"layer": one.layer, "quantity": one.quantity, "architecture": one.architecture}
    return {"folder": one.folder, **place, "configuration": one.configuration, "seed": one.seed, **known}


def _order(candidates: Sequence[Candidate]) -> Any:
    """By layer and quantity as trained, then from sparse to dense."""
    places = {key: place for place, key in enumerate(dict.fromkeys(one.key for one in candidates))}
    return lambda one: (places[one.key], one.l0, one.folder)
