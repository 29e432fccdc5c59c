"""The config of runs over digits with the demo's classifier: what tests of several packages start from."""

from collections.abc import Mapping
from typing import Any

Sections = Mapping[str, Mapping[str, Any]]

COMMON: Sections = {
    "model": {
        "spec": "module:codec_dist.demo.classifier:digits_classifier",
        "weights": "none",
        "preprocessing": {"size": 16, "channels": 1, "mean": [0.3], "std": [0.38]},
    },
    "attribution": {
        "layers": ["blocks.3", "blocks.5"],
        "method": {"name": "integrated_gradients", "options": {"steps": 2, "points": "uniform"}},
    },
    # Starting an actor takes longer than what it has to do for a few digits.
    "cluster": {"actors": 1},
}


def digits_values(*changes: Sections) -> dict[str, dict[str, Any]]:
    """Its sections; each of the ``changes`` replaces or adds values, as ``{"cluster": {"actors": 2}}`` does."""
    values = {name: dict(section) for name, section in COMMON.items()}
    for change in changes:
        for name, section in change.items():
            values[name] = values.get(name, {}) | dict(section)
    return values
