"""Which layers and SAEs a stage works on, and which mode stands for a class."""

import sys
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from codec_dist.modes import LayerModes
from codec_dist.pipeline.errors import PipelineError
from codec_dist.pipeline.run_directory import RunDirectory
from codec_dist.sae import SparseAutoencoder
from codec_dist.training import read_left_out
from codec_dist.utils import read_json, suggestion

# How many layers a message names.
NAMED = 3


def selected_saes(run: RunDirectory) -> dict[str, dict[str, str]]:
    """Layer key → quantity → folder below ``sae/`` of the SAE that later stages use."""
    selected: dict[str, dict[str, str]] = read_json(run.sae / "selected.json")
    return selected


def chosen_saes(
    run: RunDirectory, layers: Sequence[str], quantities: Sequence[str], setting: str
) -> list[tuple[str, str, Path]]:
    """The selected SAEs that a section of the config asks for, as (layer, quantity, folder).

    What training left out is left out here, too; a line tells.

    Raises:
        PipelineError: as from :func:`matching_saes`.
    """
    selected = selected_saes(run)
    left_out = {(item.layer, item.quantity): item.reason for item in read_left_out(run.sae)}
    found = matching_saes(selected, layers, quantities, setting, left_out=left_out)
    for (layer, quantity), reason in left_out.items():
        requested = quantity in quantities and any(_matches(layer, pattern) for pattern in layers)
        if requested and quantity not in selected.get(layer, {}):
            sys.stderr.write(f"{setting}: {layer}, {quantity} has no SAE and is left out: {reason}\n")
    return [(layer, quantity, run.sae / selected[layer][quantity]) for layer, quantity in found]


def matching_saes(
    selected: Mapping[str, Collection[str]],
    layers: Sequence[str],
    quantities: Sequence[str],
    setting: str,
    *,
    left_out: Collection[tuple[str, str]] = (),
    trained_yet: bool = True,
) -> list[tuple[str, str]]:
    """The (layer, quantity) with an SAE whose layer matches a name or glob.

    Args:
        selected: layer key → quantities with an SAE.
        layers: names of layers, or globs over them.
        quantities: names of quantities.
        setting: the section of the config that asks.
        left_out: what could not be trained: it may be asked for, and is not found.
        trained_yet: whether the SAEs exist, for the message.

    Raises:
        PipelineError: a pattern that no layer matches, a quantity without SAEs, one with both signs side by side, or
            layers and quantities that have SAEs, but none together.
    """
    none = f"no SAE {'was' if trained_yet else 'will be'} trained for"
    known = list(dict.fromkeys([*selected, *(layer for layer, _ in left_out)]))
    for pattern in layers:
        if not any(_matches(layer, pattern) for layer in known):
            raise PipelineError(f"{setting}.layers: {none} {pattern!r}: {suggestion(pattern, known)}")
    trained = {quantity for saes in selected.values() for quantity in saes} | {quantity for _, quantity in left_out}
    for quantity in quantities:
        if quantity.endswith("-both"):
            raise PipelineError(
                f"{setting}.quantities: a mode of {quantity!r} has two numbers per channel and so ranks no channels: "
                "name a quantity of one sign, or the net one"
            )
        if quantity not in trained:
            raise PipelineError(f"{setting}.quantities: {none} {quantity!r}: {suggestion(quantity, trained)}")
    meant = [layer for layer in known if any(_matches(layer, pattern) for pattern in layers)]
    found = [(layer, quantity) for layer in meant for quantity in quantities if quantity in selected.get(layer, ())]
    if meant and quantities and not found and not any(each in left_out for each in product(meant, quantities)):
        raise PipelineError(
            f"{setting}: {none} any of the quantities {', '.join(quantities)} of the layers {', '.join(meant[:NAMED])}"
            f"{', ...' if len(meant) > NAMED else ''}: name those that sae.groups puts together"
        )
    return found


def class_mode_rows(modes: LayerModes, folder: Path) -> dict[int, Float[Tensor, " channels"]]:
    """Class → dictionary row of its top mode, chosen on *select*; classes without a defined one are left out."""
    dictionary = SparseAutoencoder.load(folder).dictionary.cpu()
    rows = {}
    for index in range(len(modes.class_names)):
        best = modes.top_modes(index, count=1)
        if best:
            rows[index] = dictionary[best[0].mode]
    return rows


def _matches(layer: str, pattern: str) -> bool:
    return layer == pattern or fnmatchcase(layer, pattern)
