"""A small run directory in the stages' formats, written by the packages' own code where they have a writer."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from codec_dist.config import Config, parse_config
from codec_dist.interventions.class_results import SCHEMAS
from codec_dist.modes.mode_tables import STATISTICS, SUMMARY_SCHEMAS
from codec_dist.sae import build
from codec_dist.store import BlockWriter, create_store, finish_store
from codec_dist.utils import escape_name

LAYERS = ("blocks.0", "blocks.1", "blocks.2")
QUANTITIES = ("contribution-positive", "contribution-negative", "activation-positive", "activation-negative")
DECOMPOSED = ("contribution-positive", "activation-positive")
CHANNELS, MODES, SHARDS, ROWS = 6, 4, 2, 8
MASSES = ("specificity_entropy", "gini", "top1_mass", "top5_mass")
STAGES = ("extract", "train", "summarize", "intervene", "visualize")


@dataclass(frozen=True)
class Words:
    """Text of the data, which a hostile run fills with markup."""

    name: str = "fixture"
    classes: Sequence[str] = ("zero", "one", "two")
    key: str = "image-{}"
    layers: Sequence[str] = LAYERS
    labelled: bool = True
    """Without labels there are no classes: correlations, maps and causal tests are empty."""


@dataclass(frozen=True)
class Run:
    """A run on disk, with its config."""

    directory: Path
    config: Config
    words: Words


MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the files of all stages, to be copied."""
    directory = tmp_path_factory.mktemp("report") / "run"
    write_run(directory, STAGES, Words())
    return directory


@pytest.fixture
def make_run(tmp_path: Path, whole_run: Path) -> MakeRun:
    """Makes a run with the files of some stages (default: all)."""

    def make(stages: Sequence[str] = STAGES, words: Words = Words(), name: str = "run") -> Run:
        directory = tmp_path / name
        if (tuple(stages), words) == (STAGES, Words()):
            shutil.copytree(whole_run, directory)
        else:
            write_run(directory, stages, words)
        return Run(directory, make_config(directory, words), words)

    return make


def make_config(directory: Path, words: Words) -> Config:
    return parse_config(
        {
            "run": {"directory": str(directory), "name": words.name},
            "data": {"shards": str(directory / "shards")},
            "model": {"spec": "module:codec_dist.demo.classifier:digits_classifier", "weights": "none"},
        }
    )


def write_run(directory: Path, stages: Sequence[str], words: Words) -> None:
    directory.mkdir()
    writers = {
        "extract": write_store, "train": write_saes, "summarize": write_modes,
        "intervene": write_interventions, "visualize": write_figures,
    }  # fmt: skip
    for stage in stages:
        writers[stage](directory, words)
        record = {"stage": stage, "fingerprint": "f" * 64, "seconds": 1.5, "summary": {}}
        write_json(directory / "stages" / f"{stage}.json", record)


def write_store(directory: Path, words: Words) -> None:
    (directory / "shards").mkdir()
    if words.labelled:
        write_json(directory / "shards" / "classes.json", list(words.classes))
    random = np.random.default_rng(0)
    names = [f"digits-{number:06d}.tar" for number in range(SHARDS)]
    create_store(
        directory / "store", identity={"model": {"spec": words.name}, "layers": list(words.layers)},
        layers=dict.fromkeys(words.layers, CHANNELS), targets=["top_1"], quantities=QUANTITIES,
        shards=[(name, ROWS + 1) for name in names],
    )  # fmt: skip
    writer, split = BlockWriter(directory / "store"), []
    for number, name in enumerate(names):
        keys = [words.key.format(ROWS * number + row) for row in range(ROWS)]
        labels = [row % 3 if words.labelled else None for row in range(ROWS - 1)] + [None]
        parts = ["fit"] * 4 + ["select"] * 2 + ["evaluate"] * 2 if number else ["evaluate"] * ROWS
        samples: dict[str, Any] = {
            "key": keys,
            "label": pa.array(labels, pa.int32()),
            "prediction": pa.array([0 if row == 1 else row % 3 for row in range(ROWS)], pa.int32()),
            "target_value": [4.0] * ROWS,
            "baseline_value": [2.0] * ROWS,
        }
        # Far from complete where it must not count.
        samples |= {
            f"completeness.{layer}": [0.1 * (place + 1) if part == "evaluate" else 50.0 for part in parts]
            for place, layer in enumerate(words.layers)
        }
        values = {
            (layer, quantity): random.random((ROWS, CHANNELS), np.float32) * (-1 if "negative" in quantity else 1)
            for layer in words.layers
            for quantity in QUANTITIES
        }
        writer.write(number, values, pa.table(samples), [(words.key.format(f"bad-{number}"), words.key)], seconds=2.0)
        split += [
            {"shard": name, "key": key, "label": label, "part": part}
            for key, label, part in zip(keys, labels, parts, strict=True)
        ]
    finish_store(directory / "store")
    pq.write_table(pa.Table.from_pylist(split), directory / "split.parquet")


def write_saes(directory: Path, words: Words) -> None:
    selected: dict[str, dict[str, str]] = {}
    for place, layer in enumerate(words.layers):
        for quantity in DECOMPOSED:
            folder = Path(escape_name(layer), escape_name(quantity), f"{'0' * 12}-s0")
            path = directory / "sae" / folder
            build("topk", {"modes": MODES, "k": 2}, CHANNELS, seed=place).save(path)
            report = {"ev": 0.9 - 0.1 * place, "l0": 2.0, "dead_fraction": 0.25, "cosine": 0.95}
            report["hoyer_dictionary"] = 0.4
            write_json(
                path / "metrics.json",
                {
                    "layer": layer, "quantity": quantity, "architecture": "topk", "select": report,
                    "evaluate": report, "training": {"epochs": 20, "fit_rows": 8, "seconds": 3.0},
                },
            )  # fmt: skip
            lines = [json.dumps({"epoch": epoch, "ev": 1 - 1 / epoch, "loss": 1 / epoch}) for epoch in (2, 10, 20)]
            (path / "history.jsonl").write_text("\n".join(lines) + "\n")
            selected.setdefault(layer, {})[quantity] = str(folder)
    write_json(directory / "sae" / "selected.json", selected)


def write_modes(directory: Path, words: Words) -> None:
    modes, counts, classes, statistics, images = [], [], [], [], []
    known = words.labelled
    arrays = zarr.open_group(directory / "modes" / "correlations.zarr", mode="w")
    for place, layer in enumerate(words.layers):
        for kind in ("contribution", "activation"):
            ours = kind == "contribution"
            # Sparser and higher-dimensional at every layer; the E/I correlation falls; more class-specific but for one.
            hoyer = 0.3 + 0.1 * place + (0.1 if ours else 0)
            statistics.append(
                {
                    "layer": layer, "quantity": kind, "samples": 4,
                    "hoyer_mean": hoyer, "hoyer_q1": hoyer - 0.05, "hoyer_median": hoyer, "hoyer_q3": hoyer + 0.05,
                    "components_95": (2 + place if ours else 1) if known else None,
                    "participation_ratio": 1.5 if known else None,
                    "ei_mean": 0.9 - 0.4 * place, "ei_q1": 0.8 - 0.4 * place,
                    "ei_median": 0.9 - 0.4 * place, "ei_q3": 0.95 - 0.4 * place,
                }
            )  # fmt: skip
            quantity = f"{kind}-positive"
            group = arrays.require_group(f"{escape_name(layer)}/{quantity}")
            group.attrs.update({"threshold": 0.2, "class_names": list(words.classes) if known else []})
            for unit in ("mode", "channel"):
                top = 0.5 + (0.2 if ours and place else 0.1)
                counts.append(
                    {
                        "layer": layer, "quantity": quantity, "unit": unit, "modes": MODES, "alive": 3,
                        "modes_above_threshold": 2 if known else 0, "median_top_correlation": top if known else None,
                    }
                )  # fmt: skip
            for mode in range(MODES):
                alive = mode < 3
                modes.append(
                    {
                        "layer": layer, "quantity": quantity, "unit": "mode", "mode": mode, "alive": alive,
                        "frequency": 0.25 if alive else 0.0, "mean_loading": 2.0 if alive else float("nan"),
                        "hoyer": 0.4, "top_class": mode if alive and known else None,
                        "top_correlation": 0.5 + 0.1 * mode if alive and known else None,
                        **dict.fromkeys(MASSES, 0.7 if known else None),
                    }
                )  # fmt: skip
                images.append(
                    {
                        "layer": layer, "quantity": quantity, "mode": mode, "rank": 0,
                        "shard": "digits-000000.tar", "key": words.key.format(mode),
                        "label": mode % 3 if known else None, "loading": 2.0,
                    }
                )  # fmt: skip
            classes += [
                {
                    "layer": layer, "quantity": quantity, "unit": "mode", "class": index, "best_mode": index,
                    "correlation_select": 0.7, "correlation": 0.6, "modes_above_threshold": 1,
                }
                for index in range(3 if known else 0)
            ]  # fmt: skip
    tables = {"modes": modes, "layers": counts, "classes": classes, "statistics": statistics, "top_images": images}
    schemas = {**SUMMARY_SCHEMAS, "statistics": STATISTICS}
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, schemas[name]), directory / "modes" / f"{name}.parquet")


def write_interventions(directory: Path, words: Words) -> None:
    """Contribution modes are beyond chance by ablation at every layer, activation modes at none."""
    curves, areas, nulls = [], [], []
    for layer in words.layers if words.labelled else ():
        for strength, ranking in enumerate(("random", "activation-positive", "contribution-positive")):
            for kind in ("ablate", "preserve"):
                key = {"layer": layer, "ranking": ranking, "kind": kind}
                for percentage in (2.0, 10.0, 50.0):
                    for role in ("target", "off_target", "selectivity"):
                        damage = percentage / 100 * (1 + (strength if role == "target" else 0)) / 3
                        ratio = 1 - damage if kind == "ablate" else damage
                        curves.append(
                            {
                                **key, "percentage": percentage, "channels": max(1, int(percentage * CHANNELS / 100)),
                                "role": role, "ratio": -0.1 * strength if role == "selectivity" else ratio,
                                "standard_error": 0.05, "subjects": 3,
                            }
                        )  # fmt: skip
                relative = -0.2 * strength if kind == "ablate" else 0.3 * strength
                areas.append(
                    {
                        **key, "auc_target": 0.3, "auc_off_target": 0.4, "relative_auc": relative,
                        "relative_auc_low": relative - 0.15, "relative_auc_high": relative + 0.15,
                        "relative_auc_mean": relative, "relative_auc_standard_error": 0.07, "subjects": 3,
                    }
                )  # fmt: skip
                if ranking != "random":
                    nulls.append(
                        {
                            **key, "statistic": "relative_auc", "observed": relative, "draws": 20, "mean": 0.01,
                            "standard_deviation": 0.1, "low": -0.24, "high": 0.22, "p": 1 / 21,
                            "tail": "lower" if kind == "ablate" else "upper",
                        }
                    )  # fmt: skip
    (directory / "interventions").mkdir()
    tables: dict[str, list[dict[str, Any]]] = {"curves": curves, "auc": areas, "nulls": nulls}
    for name, schema in SCHEMAS.items():
        table = pa.Table.from_pylist(tables.get(name, []), schema)
        pq.write_table(table, directory / "interventions" / f"{name}.parquet")


def write_figures(directory: Path, words: Words) -> None:
    entries = []
    for layer in words.layers if words.labelled else ():
        for quantity in DECOMPOSED:
            for mode in (2, 0):
                folder = Path("maps", escape_name(layer), quantity, f"mode-{mode}")
                (directory / "figures" / folder).mkdir(parents=True)
                for rank in range(3):
                    pixels = np.random.default_rng(rank).integers(0, 256, (16, 36), np.uint8)
                    Image.fromarray(pixels).save(directory / "figures" / folder / f"{rank}.png")
                    entries.append(
                        {
                            "layer": layer, "quantity": quantity, "mode": mode, "rank": rank,
                            "shard": "digits-000000.tar", "key": words.key.format(rank), "label": rank, "loading": 3.0,
                            "class": mode, "image": str(folder / f"{rank}.png"), "map": str(folder / f"{rank}.png"),
                        }
                    )  # fmt: skip
    write_json(directory / "figures" / "maps.json", entries)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
