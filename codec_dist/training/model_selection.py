"""Which of a run's SAEs later stages use: stability over seeds, the rule of the choice, and the files that say why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from codec_dist.config import SelectionSettings
from codec_dist.modes import STABILITY_FILE, read_stability, stability_over_seeds, write_stability
from codec_dist.sae import ARCHITECTURES, FittedAutoencoder, SparseAutoencoder
from codec_dist.training.errors import TrainingError
from codec_dist.utils import hash_file, read_json, write_json_atomically

STABILITY_DIGITS = 6


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
    candidates = [replace(item, stability=stability.get(item.folder)) for item in candidates]
    decisions = choose(candidates, settings)
    picked = {decision.candidate.key: decision for decision in decisions}
    table = [
        {**_row(item), "selected": picked[item.key].candidate is item}
        for item in sorted(candidates, key=_order(candidates))
    ]
    reasons = [
        {"layer": layer, "quantity": quantity, "folder": decision.candidate.folder, "reason": decision.reason}
        for (layer, quantity), decision in picked.items()
    ]
    content = {"criterion": settings.model_dump(mode="json"), "choices": reasons, "saes": table}
    write_json_atomically(sae_folder / "selection.json", content)
    selected: dict[str, dict[str, str]] = {}
    for (layer, quantity), decision in picked.items():
        selected.setdefault(layer, {})[quantity] = decision.candidate.folder
    write_json_atomically(sae_folder / "selected.json", selected)
    return {key: sae_folder / decision.candidate.folder for key, decision in picked.items()}


def _read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
        names = {"ev", "l0", "dead_fraction", "frequency"}
        if not (names <= metrics["select"].keys() and {"layer", "quantity", "architecture"} <= metrics.keys()):
            raise KeyError("select")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"cannot read the metrics in {folder} ({error!r}): remove it, train again") from error
    return metrics


@dataclass(frozen=True)
class Candidate:
    """A trained SAE, judged on *select*."""

    folder: str
    """Relative to the run's ``sae`` folder: ``<layer>/<quantity>/<hash>-s<seed>``."""
    layer: str
    quantity: str
    architecture: str
    ev: float
    """Explained variance; nan where undefined."""
    l0: float
    """Mean number of loadings per image."""
    dead_fraction: float
    stability: float | None = None
    """Median over its living modes of their stability; None where no other seed was trained."""
    baseline: bool = False
    """Whether it is a fitted baseline (PCA, NMF), which is there for comparison."""

    @property
    def key(self) -> tuple[str, str]:
        """Layer and quantity: what it decomposes."""
        return self.layer, self.quantity

    @property
    def configuration(self) -> str:
        """What it shares with its other seeds: the folder without the seed."""
        return self.folder.rpartition("-s")[0]

    @property
    def seed(self) -> int:
        return int(self.folder.rpartition("-s")[2])


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
    for item in candidates:
        configurations.setdefault(item.configuration, []).append(item)
    medians: dict[str, float] = {}
    for seeds in configurations.values():
        folders = [sae_folder / item.folder for item in seeds]
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
    if all(item is not None for item in known):
        return [item for item in known if item is not None]
    dictionaries = [SparseAutoencoder.load(folder).dictionary.cpu() for folder in folders]
    alive = [torch.tensor(metrics[folder]["select"]["frequency"]) > 0 for folder in folders]
    found = stability_over_seeds(dictionaries, alive)
    for folder, modes in zip(folders, found, strict=True):
        write_stability(folder, modes, compared)
    return found


def _row(item: Candidate) -> dict[str, Any]:
    numbers = {"ev": item.ev, "l0": item.l0, "dead_fraction": item.dead_fraction, "stability": item.stability}
    known = {name: None if value is None or math.isnan(value) else value for name, value in numbers.items()}
    place = {"layer": item.layer, "quantity": item.quantity, "architecture": item.architecture}
    return {"folder": item.folder, **place, "configuration": item.configuration, "seed": item.seed, **known}


def _order(candidates: Sequence[Candidate]) -> Any:
    """By layer and quantity as trained, then from sparse to dense."""
    places = {key: place for place, key in enumerate(dict.fromkeys(item.key for item in candidates))}
    return lambda item: (places[item.key], item.l0, item.folder)


# ---- The rule by which one of several SAEs is chosen, and the reason in words


@dataclass(frozen=True)
class Decision:
    """The SAE that later stages use for a layer and quantity."""

    candidate: Candidate
    reason: str
    """Why, in one sentence."""


@dataclass(frozen=True)
class _Configuration:
    """The seeds of one configuration, and their means."""

    name: str
    seeds: tuple[Candidate, ...]
    ev: float
    l0: float
    stability: float | None


def choose(candidates: Sequence[Candidate], settings: SelectionSettings) -> list[Decision]:
    """Choose one SAE for each layer and quantity, in the order in which these first appear.

    Configurations are compared by the means over their seeds, so that a lucky seed does not decide.

    1. Baselines are left out where anything else was trained, and so is what has no explained variance.
    2. With ``minimum_stability``: those that reach it; if none does, the most stable one.
    3. With ``l0``: the highest explained variance among those with at most ``l0`` · (1 + ``tolerance``) loadings
       per image; if none has so few, the sparsest. Without: the sparsest that keeps ``ev_kept`` of the highest
       explained variance.
    4. Of its seeds, the one whose modes the others find again best; then the one with the higher explained variance.

    Ties go to the sparser, then to the first by name, so that the choice does not depend on the order of training.
    """
    keys = dict.fromkeys(item.key for item in candidates)
    return [_choose([item for item in candidates if item.key == key], settings) for key in keys]


def _choose(candidates: Sequence[Candidate], settings: SelectionSettings) -> Decision:
    eligible = [item for item in candidates if not item.baseline] or list(candidates)
    eligible = [item for item in eligible if math.isfinite(item.ev)] or eligible
    configurations = _configurations(eligible)
    steady, remark = _steady(configurations, settings.minimum_stability)
    picked, why = _by_sparsity(steady, settings)
    seed = min(picked.seeds, key=lambda item: (-_rounded(item.stability), -_known(item.ev), item.seed))
    reasons = [remark, why, _of_seeds(picked, seed)]
    left_out = sorted({item.architecture for item in candidates if item.baseline and item not in eligible})
    if left_out:
        reasons.append(f"{', '.join(left_out)} only for comparison")
    return Decision(seed, "; ".join(filter(None, reasons)))


def _configurations(candidates: Sequence[Candidate]) -> list[_Configuration]:
    names = sorted({item.configuration for item in candidates})
    found = []
    for name in names:
        seeds = tuple(item for item in candidates if item.configuration == name)
        stable = [item.stability for item in seeds if item.stability is not None]
        stability = fmean(stable) if stable else None
        found.append(
            _Configuration(
                name, seeds, fmean(_known(item.ev) for item in seeds), fmean(item.l0 for item in seeds), stability
            )
        )
    return found


def _steady(configurations: list[_Configuration], minimum: float | None) -> tuple[list[_Configuration], str]:
    if minimum is None:
        return configurations, ""
    steady = [item for item in configurations if item.stability is not None and item.stability >= minimum]
    if steady:
        return steady, f"{len(steady)} of {_count(configurations)} with a stability of {minimum:g} or more"
    best = max((item.stability for item in configurations if item.stability is not None), default=None)
    if best is None:
        return configurations, f"a stability of {minimum:g} was asked, but each has a single seed"
    most = [item for item in configurations if item.stability == best]
    return most, f"none of {_count(configurations)} has a stability of {minimum:g}: the most stable ({best:.2f})"


def _by_sparsity(configurations: list[_Configuration], settings: SelectionSettings) -> tuple[_Configuration, str]:
    best = min(configurations, key=lambda item: (-item.ev, item.l0, item.name))
    sparsest = min(configurations, key=lambda item: (item.l0, -item.ev, item.name))
    if len(configurations) == 1:
        # Whether it is as sparse as was asked is still worth a word.
        few = settings.l0 is None or best.l0 <= settings.l0 * (1 + settings.tolerance)
        return best, "" if few else f"{best.l0:.1f} loadings per image, above the {settings.l0:g} requested"
    if settings.l0 is not None:
        few_enough = [item for item in configurations if item.l0 <= settings.l0 * (1 + settings.tolerance)]
        if not few_enough:
            return sparsest, (
                f"none of {_count(configurations)} has at most {settings.l0:g} loadings per image: "
                f"the sparsest ({sparsest.l0:.1f})"
            )
        picked = min(few_enough, key=lambda item: (-item.ev, item.l0, item.name))
        return picked, (
            f"highest EV ({picked.ev:.3f}) of the {len(few_enough)} among {_count(configurations)} that have at most "
            f"{settings.l0:g} loadings per image"
        )
    if best.ev <= 0:
        return best, f"highest EV ({best.ev:.3f}) of {_count(configurations)}; none explains anything"
    keeping = [item for item in configurations if item.ev >= settings.ev_kept * best.ev]
    picked = min(keeping, key=lambda item: (item.l0, -item.ev, item.name))
    return picked, (
        f"sparsest of {_count(configurations)} that keeps {100 * settings.ev_kept:g} % of the highest EV "
        f"({picked.ev:.3f} of {best.ev:.3f}, with {picked.l0:.1f} loadings per image instead of {best.l0:.1f})"
    )


def _of_seeds(picked: _Configuration, seed: Candidate) -> str:
    if len(picked.seeds) == 1:
        return ""
    stable = f" (stability {seed.stability:.2f})" if seed.stability is not None else ""
    return f"of its {len(picked.seeds)} seeds the one whose modes the others find again best{stable}"


def _count(configurations: Sequence[_Configuration]) -> str:
    return f"{len(configurations)} configuration{'' if len(configurations) == 1 else 's'}"


def _known(ev: float) -> float:
    """An explained variance that is not defined counts as the worst."""
    return ev if math.isfinite(ev) else -math.inf


def _rounded(stability: float | None) -> float:
    # Two seeds are as stable as each other, but for rounding, which must not decide.
    return -1.0 if stability is None else round(stability, STABILITY_DIGITS)
