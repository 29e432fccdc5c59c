"""The stage `visualize`: mode maps of the images that load highest on the most class-correlated modes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codec_dist.config import Config
from codec_dist.interventions import rank_channels
from codec_dist.modes import LayerModes, ModeSummary
from codec_dist.pipeline.images import load_run_model, run_index, shard_images
from codec_dist.pipeline.selected_saes import chosen_saes
from codec_dist.pipeline.stage import StageContext
from codec_dist.sae import SparseAutoencoder
from codec_dist.utils import Progress
from codec_dist.visualization import GallerySample, ModeGallery, draw_mode_maps

Sample = tuple[str, str]
"""Shard and key."""


def visualize(context: StageContext) -> dict[str, Any]:
    """Write ``figures/``: PNG files and ``maps.json``."""
    config, run, settings = context.config, context.run, context.config.visualization
    model = load_run_model(config)
    summary = ModeSummary.load(run.modes)
    saes = chosen_saes(run, settings.layers, settings.quantities, "visualization")
    selected = [
        (summary.modes(layer, quantity), folder, mode, target)
        for layer, quantity, folder in saes
        for mode, target in top_modes(summary.modes(layer, quantity), settings.modes)
    ]
    wanted = {(row["shard"], row["key"]) for modes, _, mode, _ in selected for row in _best_images(modes, mode, config)}
    images = _load(config, sorted(wanted))
    with Progress("visualize", total=len(selected), unit="modes") as progress:
        entries = draw_mode_maps(
            run.figures,
            model.module,
            _counted(_galleries(config, selected, images), progress),
            denormalise=model.preprocessing.denormalise,
            median_filter=settings.median_filter,
            contrast=settings.contrast,
        )
    if context.tracker is not None:
        columns = ["layer", "quantity", "mode", "class", "key", "loading", "stability", "image and mode map"]
        best = [entry for entry in entries if entry["rank"] == 0]
        rows = [
            [*(entry[name] for name in columns[:-2]), _stability(summary, entry), run.figures / entry["map"]]
            for entry in best
        ]
        context.tracker.table("modes/maps", columns, rows)
    return {"modes": len(selected), "maps": len(entries)}


def top_modes(modes: LayerModes, count: int) -> list[tuple[int, int | None]]:
    """The modes most correlated with a class on *select*, as (mode, class), best first.

    A class's second mode comes only after every class's first, so that a few modes show many classes. Without
    labels: the modes that fire most often on *select*, and no class.
    """
    correlation = modes.select.correlation.nan_to_num(-2)
    if not len(correlation) or bool((correlation == -2).all()):
        frequency = modes.select.frequency.nan_to_num(0)
        order: list[int] = frequency.argsort(descending=True, stable=True).tolist()
        firing: list[tuple[int, int | None]] = [(mode, None) for mode in order if frequency[mode] > 0]
        return firing[:count]
    best, classes = correlation.max(dim=0)
    by_correlation = [int(mode) for mode in best.argsort(descending=True, stable=True) if best[mode] > -2]
    seen: dict[int, int] = {}
    turns = []
    for place, mode in enumerate(by_correlation):
        target = int(classes[mode])
        turns.append((seen.get(target, 0), place, mode, target))
        seen[target] = seen.get(target, 0) + 1
    return [(mode, target) for _, _, mode, target in sorted(turns)[:count]]


def _stability(summary: ModeSummary, entry: dict[str, Any]) -> float | None:
    stability = summary.modes(entry["layer"], entry["quantity"]).stability
    return None if stability is None else float(stability[entry["mode"]])


def _galleries(
    config: Config, selected: Sequence[tuple[LayerModes, Path, int, int | None]], images: dict[Sample, Tensor]
) -> Iterator[ModeGallery]:
    model = load_run_model(config).module
    for modes, folder, mode, target in selected:
        dictionary = SparseAutoencoder.load(folder).dictionary.cpu()
        rows = [row for row in _best_images(modes, mode, config) if (row["shard"], row["key"]) in images]
        if target is None and rows:
            with torch.inference_mode():
                target = int(model(images[rows[0]["shard"], rows[0]["key"]][None]).argmax())
        yield ModeGallery(
            layer=modes.layer,
            quantity=modes.quantity,
            mode=mode,
            channels=rank_channels(dictionary[mode])[: config.visualization.channels].tolist(),
            target=target or 0,
            samples=[GallerySample(row["shard"], row["key"], row["label"], row["loading"]) for row in rows],
            images=torch.stack([images[row["shard"], row["key"]] for row in rows]) if rows else torch.empty(0, 1, 1, 1),
        )


def _best_images(modes: LayerModes, mode: int, config: Config) -> list[dict[str, Any]]:
    # A mode that fires on few images has zeros among its best; they show nothing.
    rows: list[dict[str, Any]] = modes.images(mode)[: config.visualization.images]
    return [row for row in rows if row["loading"] > 0]


def _load(config: Config, wanted: Sequence[Sample]) -> dict[Sample, Tensor]:
    keys: dict[str, list[str]] = {}
    for shard, key in wanted:
        keys.setdefault(shard, []).append(key)
    return {
        (info.name, sample.key): sample.image
        for info in run_index(config).shards
        if info.name in keys
        for sample in shard_images(config, info, keys[info.name])
    }


def _counted(galleries: Iterator[ModeGallery], progress: Progress) -> Iterator[ModeGallery]:
    for gallery in galleries:
        yield gallery
        progress.advance(1, f"{gallery.layer} mode {gallery.mode}")
