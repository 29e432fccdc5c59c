"""All that the report shows, read once; what a stage has not made yet is empty."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from codec_dist.config import store_of_run
from codec_dist.interventions import results_are_current
from codec_dist.report.errors import ReportError
from codec_dist.report.store_facts import StoreFacts, read_store_facts
from codec_dist.shards import shards_folder
from codec_dist.store import store_exists
from codec_dist.utils import read_json

Row = dict[str, Any]

CONTRIBUTION, ACTIVATION, RANDOM = "contribution", "activation", "random"

RESULTS: dict[str, str | None] = {
    "prepare": "split.parquet",
    "extract": None,
    "train": "sae/selected.json",
    "summarize": "modes/modes.parquet",
    "intervene": "interventions/curves.parquet",
    "visualize": "figures/maps.json",
}
"""Stages in the order of the flow, and the file of the run by which one sees that a stage has left results.

None for extraction: the store may be elsewhere."""


@dataclass(frozen=True)
class SaeFacts:
    """One trained SAE."""

    folder: Path
    metrics: Mapping[str, Any]
    """metrics.json: layer, quantity, architecture, reports on *select* and *evaluate*, training."""
    history: Sequence[Row]
    """history.jsonl: metrics on *select* by epoch."""
    options: Mapping[str, Any]
    """Options of the architecture."""
    selected: bool
    """Whether later stages use it."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training."""
    channels: int | None = None
    """Channels of the rows that it decomposes."""
    stability: float | None = None
    """Median over its living modes of the cosine with those matched in other seeds; None for a single seed."""

    @property
    def layer(self) -> str:
        return str(self.metrics["layer"])

    @property
    def quantity(self) -> str:
        return str(self.metrics["quantity"])

    @property
    def architecture(self) -> str:
        return str(self.metrics["architecture"])

    @property
    def configuration(self) -> str:
        """What it shares with its other seeds: the folder without the seed."""
        return str(self.folder).rpartition("-s")[0]

    @property
    def evaluate(self) -> Mapping[str, Any]:
        """The report on *evaluate*."""
        return self.metrics.get("evaluate") or {}


@dataclass(frozen=True)
class RunData:
    """The files of a run as plain rows, in the forms that the stages write."""

    directory: Path
    store: StoreFacts | None
    saes: Sequence[SaeFacts]
    statistics: Sequence[Row]
    layer_counts: Sequence[Row]
    classes: Sequence[Row]
    modes: Sequence[Row]
    maps: Sequence[Row]
    curves: Sequence[Row]
    areas: Sequence[Row]
    stages: Sequence[Row]
    class_names: Sequence[str]
    made: frozenset[str] = frozenset()
    """Stages whose results are here and are shown."""
    left_out: frozenset[str] = frozenset()
    """Stages whose results are here but belong to other settings or to an earlier version."""
    criterion: Mapping[str, Any] = field(default_factory=dict)
    """By which the used SAEs were chosen; empty where it is not known."""
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Why each was chosen, by layer and quantity; empty where there was no choice."""
    nulls: Sequence[Row] = ()
    """Statistics of the causal tests beside those of random channels."""

    without_sae: Sequence[Row] = ()
    """SAEs that could not be trained: layer, quantity, architecture, reason."""

    @property
    def unlabelled(self) -> bool:
        """Whether it is known that no image of *evaluate* has a label, so that nothing about classes is defined."""
        return self.store is not None and self.store.measured_labelled == 0

    @cached_property
    def layers(self) -> list[str]:
        """Layer keys from input to output."""
        if self.store is not None:
            return list(self.store.layers)
        return list(dict.fromkeys(row["layer"] for rows in (self.statistics, self.layer_counts) for row in rows))

    def by_layer(self, rows: Sequence[Row], column: str, **equal: Any) -> list[float | None]:
        """One value per layer: ``column`` of the row that matches ``equal``; None where there is none."""
        found = {row["layer"]: row[column] for row in rows if all(row[name] == value for name, value in equal.items())}
        return [found.get(layer) for layer in self.layers]

    def area(self, layer: str, ranking: str, kind: str) -> Row | None:
        """The areas of one pair of curves."""
        return _first(self.areas, layer=layer, ranking=ranking, kind=kind)

    def null(self, layer: str, ranking: str, kind: str) -> Row | None:
        """A relative AUC beside those of random channels; None where there is none or no draw has one."""
        row = _first(self.nulls, layer=layer, ranking=ranking, kind=kind, statistic="relative_auc")
        return row if row is not None and row["draws"] else None

    def selected_sae(self, layer: str, quantity: str) -> SaeFacts | None:
        """The SAE that later stages use for a layer and quantity."""
        fits = (sae for sae in self.saes if sae.selected and (sae.layer, sae.quantity) == (layer, quantity))
        return next(fits, None)

    def class_name(self, label: int | None) -> str:
        """A class's name, else its number; ``no label`` for none."""
        if label is None or label < 0:
            return "no label"
        return self.class_names[label] if label < len(self.class_names) else str(label)


def read_run(
    directory: Path, shards: str | None = None, current: Collection[str] | None = None, store: str | None = None
) -> RunData:
    """Read whatever stages have written so far.

    Args:
        directory: the run's folder.
        shards: where the shards are; a local ``classes.json`` there names classes until modes are summarized.
        current: stages whose results belong together; those of other stages are left out. None: all that is there.
        store: folder or URL of the store; default: as the run's own config says.

    Raises:
        ReportError: no such folder, or a file that is there but cannot be read.
    """
    if not directory.is_dir():
        raise ReportError(f"there is no run in {directory}: give the folder of a run, or run `codec-dist run` first")
    shown = set(RESULTS if current is None else current)
    store = store or store_of_run(directory)
    there = {stage for stage, path in RESULTS.items() if path is not None and (directory / path).exists()}
    there |= {"extract"} if store_exists(store) else set()
    if not results_are_current(directory / "interventions"):
        # Numbers of an earlier version mean something else: they are left out until the stage has run again.
        shown.discard("intervene")

    def table(stage: str, name: str) -> list[Row]:
        return _read_table(directory / name) if stage in shown else []

    selection = _read_selection(directory / "sae") if "train" in shown else {}
    records = [directory / "stages" / f"{stage}.json" for stage in RESULTS if stage in shown]
    return RunData(
        directory=directory,
        store=read_store_facts(store, directory, "prepare" in shown) if "extract" in there & shown else None,
        saes=_read_saes(directory / "sae", selection) if "train" in shown else [],
        statistics=table("summarize", "modes/statistics.parquet"),
        layer_counts=table("summarize", "modes/layers.parquet"),
        classes=table("summarize", "modes/classes.parquet"),
        modes=table("summarize", "modes/modes.parquet"),
        maps=_read_json(directory / "figures" / "maps.json", []) if "visualize" in shown else [],
        curves=table("intervene", "interventions/curves.parquet"),
        areas=table("intervene", "interventions/auc.parquet"),
        stages=[_read_json(path, {}) for path in records if path.exists()],
        class_names=_class_names(directory / "modes" if "summarize" in shown else None, shards),
        made=frozenset(there & shown),
        left_out=frozenset(there - shown),
        criterion=selection.get("criterion", {}),
        nulls=table("intervene", "interventions/nulls.parquet"),
        without_sae=_read_left_out(directory / "sae") if "train" in shown else [],
        reasons={(row["layer"], row["quantity"]): row["reason"] for row in selection.get("choices", [])},
    )


def quantity_kind(quantity: str) -> str:
    """``contribution``, ``activation``, ``gradient`` or ``random``: what a quantity or a ranking is about."""
    return quantity.partition("-")[0].partition("[")[0]


def _first(rows: Sequence[Row], **equal: Any) -> Row | None:
    return next((row for row in rows if all(row[name] == value for name, value in equal.items())), None)


def _read_selection(folder: Path) -> dict[str, Any]:
    """selection.json: criterion, choices and candidates; empty where there is none."""
    selection = _read_json(folder / "selection.json", {})
    try:
        for row in [*selection.get("choices", []), *selection.get("saes", [])]:
            _ = row["folder"], row["layer"], row["quantity"]
    except (AttributeError, TypeError, KeyError) as error:
        raise ReportError(f"{folder / 'selection.json'} tells of no choice: run `codec-dist train` again") from error
    return dict(selection)


def _read_left_out(folder: Path) -> list[Row]:
    """left_out.json: what training left out, and why; nothing where there is no such file."""
    rows = _read_json(folder / "left_out.json", [])
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"layer", "quantity", "architecture", "reason"} <= row.keys() for row in rows
    ):
        raise ReportError(f"{folder / 'left_out.json'} lists no SAEs: run `codec-dist train` again")
    return rows


def _read_saes(folder: Path, selection: Mapping[str, Any]) -> list[SaeFacts]:
    selected = _read_json(folder / "selected.json", {})
    found = {(folder / path).resolve() for quantities in selected.values() for path in quantities.values()}
    stability = {row["folder"]: row.get("stability") for row in selection.get("saes", [])}
    saes = []
    for path in _sae_files(folder):
        metrics, config = _read_json(path, {}), _read_json(path.parent / "config.json", {})
        if not {"layer", "quantity", "architecture"} <= metrics.keys():
            raise ReportError(f"{path} does not describe an SAE: run `codec-dist train` again")
        history = _read_lines(path.parent / "history.jsonl")
        options = {**config.get("options", {}), "modes": config.get("modes")}
        saes.append(
            SaeFacts(
                path.parent, metrics, history, options, path.parent.resolve() in found,
                training=config.get("details", {}).get("training") or {}, channels=config.get("channels"),
                stability=stability.get(path.parent.relative_to(folder).as_posix()),
            )
        )  # fmt: skip
    return saes


def _sae_files(folder: Path) -> list[Path]:
    """metrics.json of every finished SAE of the current plan; of every one that is there where no plan is kept."""
    plan = _read_json(folder / "trained.json", None)
    if plan is None:
        return sorted(folder.glob("*/*/*/metrics.json"))
    if not isinstance(plan, list) or not all(isinstance(path, str) for path in plan):
        raise ReportError(f"{folder / 'trained.json'} is not a list of folders: run `codec-dist train` again")
    return sorted(path for name in set(plan) if (path := folder / name / "metrics.json").exists())


def _read_table(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        rows: list[Row] = pq.read_table(path, partitioning=None).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"cannot read {path} ({_one_line(error)}): remove it and run its stage again") from error
    # A statistic that is not a number is one that is not defined.
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path} ({_one_line(error)}): remove it and run its stage again") from error


def _read_lines(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path} ({_one_line(error)}): train this SAE again") from error


def _class_names(modes: Path | None, shards: str | None) -> list[str]:
    if modes is not None and (arrays := modes / "correlations.zarr").exists():
        for _, group in zarr.open_group(arrays, mode="r").groups():
            for _, inner in group.groups():
                return [str(name) for name in inner.attrs.get("class_names", [])]
    if shards is not None and "://" not in shards:
        names = _read_json(Path(shards_folder(shards)) / "classes.json", [])
        return [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else list(map(str, names))
    return []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
