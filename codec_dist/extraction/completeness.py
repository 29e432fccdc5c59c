"""How far the stored contributions are from adding up, layer by layer, and what to do where that is too far."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from codec_dist.attribution import METHODS, IntegratedGradients
from codec_dist.config import Config

PREFIX = "completeness."
# Median relative residuals above this are warned of.
LARGE_RESIDUAL = 0.1
SMALLEST_CHANGE = 1e-3


@dataclass(frozen=True)
class Completeness:
    """Medians over the stored images.

    Attributes:
        residuals: cut layer → relative residual |ΣC - ΔT| / max(|ΔT|, 10⁻³ · median |ΔT|), of the first target.
        steps: mean number of steps of the images' paths, where images have paths of their own.
    """

    residuals: Mapping[str, float]
    steps: float | None = None

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> "Completeness":
        """Of a store's tables of samples; 8 bytes per image and layer are kept meanwhile."""
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        for table in tables:
            change = np.abs(table["target_value"].to_numpy() - table["baseline_value"].to_numpy())
            columns[""].append(change.astype(np.float32))
            for name in table.column_names:
                if name.startswith(PREFIX) or name == "path_steps":
                    columns[name].append(table[name].to_numpy().astype(np.float32))
        whole = {name: np.concatenate(parts) for name, parts in columns.items()}
        if not whole or not len(whole[""]):
            return cls({})
        change = np.maximum(whole[""], SMALLEST_CHANGE * np.median(whole[""]))
        residuals = {}
        for name, values in whole.items():
            if name.startswith(PREFIX):
                with np.errstate(divide="ignore", invalid="ignore"):
                    relative = np.where(values == 0, 0, np.abs(values) / change)
                residuals[name.removeprefix(PREFIX)] = float(np.median(relative))
        steps = float(whole["path_steps"].mean()) if "path_steps" in whole else None
        return cls(residuals, steps)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest residual, of those that have one; None where no layer has."""
        known = [item for item in self.residuals.items() if math.isfinite(item[1])]
        return max(known, key=lambda item: item[1], default=None)

    def lines(self, config: Config) -> list[str]:
        """What a user should know: the residual of every layer, and a warning where one is large."""
        if not self.residuals:
            return []
        if self.worst is None:
            return ["warning: the target does not change between baseline and image: there is nothing to add up to"]
        layer, residual = self.worst
        by_layer = ", ".join(f"{name} {value:.1%}" for name, value in self.residuals.items())
        lines = [f"contributions miss by (median over images of the relative residual): {by_layer}"]
        if self.steps is not None:
            lines.append(f"steps per image: {self.steps:.1f} on average")
        if residual > LARGE_RESIDUAL:
            lines.append(
                f"warning: at {layer} contributions miss {residual:.1%} of what they should add up to, more than "
                f"{LARGE_RESIDUAL:.0%}: {_advice(config)}"
            )
        return lines


def _advice(config: Config) -> str:
    """The setting of ``attribution.method.options`` that helps first."""
    method = METHODS.build(config.attribution.method.name, config.attribution.method.options)
    if not isinstance(method, IntegratedGradients):
        return "use integrated_gradients"
    where = "attribution.method.options"
    if method.steps == "auto":
        return f"lower {where}.tolerance"
    if not method.learns_points and method.adaptive is None:
        learn = f"set {where}.points to learned, " if isinstance(method.steps, int) and method.steps > 1 else ""
        return f"{learn}raise {where}.steps, or set {where}.adaptive"
    if method.adaptive is None:
        return f"raise {where}.steps, or set {where}.adaptive to {{tolerance: 0.1, most: 30}}"
    return f"raise {where}.adaptive.most, or lower its tolerance"
