"""The findings of contribution decomposition by block, of one extraction or of several side by side.

Of each block's contributions and activations, over all images of the store: median Hoyer sparsity, principal components
that hold 90 % of the variance of the class means, and median E/I correlation (METHOD §4); beside them the median
relative residual of completeness, which says how far the contributions can be trusted.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from codec_dist.attribution import relative_residual
from codec_dist.statistics import LayerStatistics
from codec_dist.store import ContributionStore, find_store

KINDS = ("contribution", "activation")
VARIANCE = 0.9
COLUMNS = ("residual", "Hoyer c", "Hoyer a", "comp. c", "comp. a", "E/I c", "E/I a")
"""Of contributions (c) and activations (a)."""


def compare(places: Sequence[str]) -> int:
    """Print a table of the findings in run folders or stores, block by block, and one JSON line."""
    stores = {place: ContributionStore(find_store(place)) for place in places}
    findings = {place: {layer: measure(store, layer) for layer in store.layers} for place, store in stores.items()}
    for letter, (place, store) in zip("ABCDEFGH", stores.items()):
        print(f"{letter}: {place}, {len(store):,} images, {json.dumps(store.identity.get('method'))}")
    print(f"c: contributions, a: activations; comp.: components for {VARIANCE:.0%} of the variance of class means")
    letters = "ABCDEFGH"[: len(places)]
    print(f"{'':14}" + " | ".join(f"{letter + ': ' + COLUMNS[0]:>11}" + _words(COLUMNS[1:]) for letter in letters))
    layers = dict.fromkeys(layer for found in findings.values() for layer in found)
    for layer in layers:
        cells = [_row(found.get(layer, {})) for found in findings.values()]
        print(f"{layer:14}" + " | ".join(f"{first:>11}" + _words(others) for first, *others in cells))
    print(json.dumps({"benchmark": "real", "findings": findings}))
    return 0


def measure(store: ContributionStore, layer: str) -> dict[str, float | int | None]:
    """The findings at one layer, by name; None where undefined, or for residuals where paths lead around the layer."""
    samples = store.samples
    labels = torch.tensor(samples["label"].fill_null(-1).to_numpy(), dtype=torch.int64)
    found: dict[str, float | int | None] = {"residual": _residual(store, layer)}
    for kind in KINDS:
        statistics = LayerStatistics(store.layers[layer], int(labels.max()) + 1)
        positive, negative = (
            torch.from_numpy(store.read(layer, f"{kind}-{sign}")) for sign in ("positive", "negative")
        )
        statistics.update(positive, negative, labels)
        result = statistics.result()
        cumulative = result.class_means.cumulative_variance
        # A fraction that is reached but for rounding counts as reached.
        components = int((cumulative < VARIANCE - 1e-12).sum()) + 1 if len(cumulative) else None
        found |= {
            f"{kind}_hoyer": result.hoyer.median,
            f"{kind}_components": components,
            f"{kind}_ei": result.sign_correlation.median,
        }
    return found


def _residual(store: ContributionStore, layer: str) -> float | None:
    samples, name = store.samples, f"completeness.{layer}"
    if name not in samples.column_names:
        return None
    values = [
        torch.from_numpy(samples[column].to_numpy().astype(np.float64))
        for column in (name, "target_value", "baseline_value")
    ]
    relative = relative_residual(*values)
    return float(relative.nanmedian()) if not relative.isnan().all() else None


def _row(found: dict[str, Any]) -> list[str]:
    names = ["residual", *(f"{kind}_{what}" for what in ("hoyer", "components", "ei") for kind in KINDS)]
    return [_text(found.get(name)) for name in names]


def _text(value: float | int | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def _words(words: Sequence[str]) -> str:
    return "".join(f"{word:>9}" for word in words)
