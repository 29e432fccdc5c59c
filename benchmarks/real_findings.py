"""The findings of contribution decomposition by block, of one extraction or of several side by side.

Of each block's contributions and activations, over all images of the store: median Hoyer sparsity, principal components
that hold 90 % of the variance of the class means, and median E/I correlation (docs/method.md §4); beside them the
median relative residual of completeness, which says how far the contributions can be trusted.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from codec_dist.attribution import relative_residual
from codec_dist.statistics import LayerStatistics
from codec_dist.store import ContributionStore, StoreError, find_store

UNRELATED = {"device", "optimizations", "microbatch"}
"""Settings of a store that say nothing about the method."""
KINDS = ("contribution", "activation")
VARIANCE = 0.9
COLUMNS = ("residual", "Hoyer c", "Hoyer a", "comp. c", "comp. a", "E/I c", "E/I a")
"""Of contributions (c) and activations (a)."""


def compare(places: Sequence[str]) -> int:
    """Print a table of the findings in run folders or stores, block by block, and one JSON line."""
    stores = {place: ContributionStore(find_store(place)) for place in places}
    for place, store in stores.items():
        if not len(store):
            raise StoreError(f"{place} holds no images yet: run `codec-dist extract` until it is complete")
    findings = {place: {layer: measure(store, layer) for layer in store.layers} for place, store in stores.items()}
    for number, (place, store) in enumerate(stores.items(), 1):
        print(f"{number}: {place}, {len(store):,} images, {_described(store)}")
    print(f"c: contributions, a: activations; comp.: components for {VARIANCE:.0%} of the variance of class means")
    headings = (f"{f'{number}: {COLUMNS[0]}':>11}" + _words(COLUMNS[1:]) for number in range(1, len(stores) + 1))
    print(f"{'':14}" + " | ".join(headings))
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
            f"{kind}_hoyer": _rounded(result.hoyer.median),
            f"{kind}_components": components,
            f"{kind}_ei": _rounded(result.sign_correlation.median),
        }
    return found


def _described(store: ContributionStore) -> str:
    """The method, and what was chosen for it when the store was made."""
    method = store.identity["attribution"]["method"]
    chosen = {name: value for name, value in store.settings.items() if name not in UNRELATED}
    return json.dumps({**method, **chosen})


def _residual(store: ContributionStore, layer: str) -> float | None:
    samples, name = store.samples, f"completeness.{layer}"
    if name not in samples.column_names:
        return None
    values = [
        torch.from_numpy(samples[column].to_numpy().astype(np.float64))
        for column in (name, "target_value", "baseline_value")
    ]
    relative = relative_residual(*values)
    return _rounded(float(relative.nanmedian())) if not relative.isnan().all() else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _row(found: dict[str, Any]) -> list[str]:
    names = ["residual", *(f"{kind}_{what}" for what in ("hoyer", "components", "ei") for kind in KINDS)]
    return [_text(found.get(name)) for name in names]


def _text(value: float | int | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def _words(words: Sequence[str]) -> str:
    return "".join(f"{word:>9}" for word in words)
