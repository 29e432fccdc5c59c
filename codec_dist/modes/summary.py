"""A run's mode summary, as a notebook reads it."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from codec_dist.modes.errors import ModesError
from codec_dist.modes.layer_modes import CHANNEL, MODE, LayerModes
from codec_dist.modes.mode_tables import join_tables, summary_tables
from codec_dist.modes.summary_files import SummaryWriter, read_layer, read_tables
from codec_dist.utils import suggestion

Key = tuple[str, str, str]


class ModeSummary:
    """All layers and quantities of a run, as modes and as raw channels side by side.

    ::

        summary = ModeSummary.load(Path("run/modes"))
        modes = summary.modes("blocks.5", "contribution-positive")
        modes.top_modes("cat")            # chosen on *select*, with the correlation on *evaluate*
        modes.correlation                 # [classes, modes]
        summary.tables["layers"]          # pyarrow; .to_pandas()

    Correlations are read when a layer is asked for, so a summary of any size opens at once.
    """

    def __init__(self, entries: Iterable[LayerModes]) -> None:
        self._entries: dict[Key, Callable[[], LayerModes]] = {
            (entry.layer, entry.quantity, entry.unit): functools.partial(_same, entry) for entry in entries
        }
        self._tables: dict[str, pa.Table] | None = None

    @classmethod
    def load(cls, directory: Path | str) -> "ModeSummary":
        """Open the folder that the stage `summarize`, or :meth:`save`, wrote.

        Raises:
            ModesError: a file is missing or is not of a summary.
        """
        directory = Path(directory)
        tables = read_tables(directory)
        keys = tables["layers"].select(["layer", "quantity", "unit"]).to_pylist()
        summary = cls(())
        summary._tables = tables
        for key in keys:
            name = (key["layer"], key["quantity"], key["unit"])
            summary._entries[name] = functools.cache(
                functools.partial(read_layer, directory, *name, tables["top_images"])
            )
        return summary

    def save(self, directory: Path | str) -> None:
        """Write all files of a summary into a folder, instead of those that are there."""
        with SummaryWriter(Path(directory)) as writer:
            for entry in self:
                writer.add(entry)

    @property
    def tables(self) -> dict[str, pa.Table]:
        """The tables of all layers, named as the Parquet files are."""
        if self._tables is None:
            self._tables = join_tables(map(summary_tables, self))
        return self._tables

    @property
    def layers(self) -> list[str]:
        """Layer keys, in the order in which they were summarized."""
        return list(dict.fromkeys(layer for layer, _, _ in self._entries))

    @property
    def keys(self) -> list[Key]:
        """Layer key, quantity and unit (``mode`` or ``channel``) of all that is summarized."""
        return list(self._entries)

    def modes(self, layer: str, quantity: str) -> LayerModes:
        """The modes of one layer and quantity.

        Raises:
            ModesError: there are none.
        """
        return self._find(layer, quantity, MODE)

    def channels(self, layer: str, quantity: str) -> LayerModes:
        """The raw channels of one layer and quantity.

        Raises:
            ModesError: they were not summarized.
        """
        return self._find(layer, quantity, CHANNEL)

    def __iter__(self) -> Iterator[LayerModes]:
        return (entry() for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _find(self, layer: str, quantity: str, unit: str) -> LayerModes:
        if (layer, quantity, unit) in self._entries:
            return self._entries[layer, quantity, unit]()
        known = {f"{name} {kind}" for name, kind, of in self._entries if of == unit}
        raise ModesError(f"{quantity} of {layer} has no summarized {unit}s: {suggestion(f'{layer} {quantity}', known)}")


def _same(entry: LayerModes) -> LayerModes:
    return entry
