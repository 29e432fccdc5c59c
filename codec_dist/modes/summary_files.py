"""The files of a mode summary: Parquet tables, and Zarr for the rest; and the summary as a notebook reads it."""

import functools
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import zarr
from torch import Tensor

from codec_dist import utils
from codec_dist.modes.errors import ModesError
from codec_dist.modes.layer_modes import CHANNEL, MODE, LayerModes
from codec_dist.modes.layer_summary import Correlations
from codec_dist.modes.mode_tables import SUMMARY_SCHEMAS, join_tables, statistics_table, summary_tables
from codec_dist.statistics import Distribution, LayerStatisticsResult
from codec_dist.utils import escape_name, suggestion, write_bytes_atomically

CORRELATIONS, STATISTICS = "correlations.zarr", "statistics.zarr"
PER_MODE = ("frequency", "mean_when_on")
CHUNK_BYTES = 16 * 2**20

Key = tuple[str, str, str]


class SummaryWriter:
    """Writes layer after layer, so that only one layer's correlations are in memory.

    Use as a context manager. The files appear when it ends without an error; until then a reader sees
    those of before.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = Path(directory)
        self._arrays = _ArrayFolder(self._directory / CORRELATIONS)
        self._tables: list[dict[str, pa.Table]] = []

    def add(self, entry: LayerModes) -> None:
        """Write one layer, quantity and unit."""
        self._tables.append(summary_tables(entry))
        group = self._arrays.root.require_group(group_path(entry.layer, entry.quantity, entry.unit))
        group.attrs.update(
            {
                "threshold": entry.threshold,
                "class_names": list(entry.class_names),
                "concepts": {name: list(members) for name, members in entry.concepts.items()},
            }
        )
        write_array(group, "select", entry.select.correlation)
        write_array(group, "evaluate", entry.evaluate.correlation)
        for part, correlations in (("select", entry.select), ("evaluate", entry.evaluate)):
            group[part].attrs.update({"rows": correlations.rows, "samples": correlations.samples})
            write_array(group, f"{part}_class_samples", correlations.class_samples)
            for name in PER_MODE:
                write_array(group, f"{part}_{name}", getattr(correlations, name))
        if entry.hoyer is not None:
            write_array(group, "hoyer", entry.hoyer)
        if entry.stability is not None:
            write_array(group, "stability", entry.stability)

    def __enter__(self) -> "SummaryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._arrays.__exit__(kind, error, trace)
        if kind is not None:
            return
        for name, table in join_tables(self._tables).items():
            write_table(self._directory / f"{name}.parquet", table)


def read_layer(directory: Path, layer: str, quantity: str, unit: str, images: pa.Table) -> LayerModes:
    """Read what :class:`SummaryWriter` wrote of one layer; ``images`` is all of ``top_images.parquet``.

    Raises:
        ModesError: the layer is not there.
    """
    try:
        group = zarr.open_group(Path(directory) / CORRELATIONS, mode="r")[group_path(layer, quantity, unit)]
    except (FileNotFoundError, KeyError) as error:
        raise ModesError(f"{directory} holds no summary of {quantity} of {layer}: summarize it first") from error
    own = pc.and_(pc.equal(images["layer"], layer), pc.equal(images["quantity"], quantity))
    return LayerModes(
        layer=layer,
        quantity=quantity,
        unit=unit,
        select=_read_correlations(group, "select"),
        evaluate=_read_correlations(group, "evaluate"),
        threshold=group.attrs["threshold"],
        class_names=tuple(group.attrs["class_names"]),
        hoyer=torch.from_numpy(group["hoyer"][:]) if "hoyer" in group else None,
        stability=torch.from_numpy(group["stability"][:]) if "stability" in group else None,
        concepts={name: tuple(members) for name, members in group.attrs["concepts"].items()},
        top_images=images.filter(own).drop_columns(["layer", "quantity"]) if unit == MODE else None,
    )


def read_tables(directory: Path) -> dict[str, pa.Table]:
    """The Parquet tables of a summary, by file name.

    Raises:
        ModesError: a file is missing or is not such a table.
    """
    return utils.read_tables(directory, SUMMARY_SCHEMAS, ModesError, "summarize")


def write_statistics(directory: Path, results: Mapping[tuple[str, str], LayerStatisticsResult]) -> None:
    """Write ``statistics.parquet`` and, for what is not one number, ``statistics.zarr``.

    Args:
        directory: folder of the stage; made when missing.
        results: statistics by layer key and kind (``contribution`` or ``activation``).
    """
    with _ArrayFolder(Path(directory) / STATISTICS) as root:
        for (layer, kind), result in results.items():
            group = root.require_group(f"{escape_name(layer)}/{escape_name(kind)}")
            means = result.class_means
            write_array(group, "class_samples", means.class_samples)
            write_array(group, "class_means", means.means)
            write_array(group, "class_correlation", means.class_correlation)
            write_array(group, "cumulative_variance", means.cumulative_variance)
            write_array(group, "channel_minimum", result.channel_minimum)
            write_array(group, "channel_maximum", result.channel_maximum)
            _write_histogram(group, "hoyer_histogram", result.hoyer)
            _write_histogram(group, "ei_histogram", result.sign_correlation)
    write_table(Path(directory) / "statistics.parquet", statistics_table(results))


def group_path(layer: str, quantity: str, unit: str) -> str:
    """Where a layer's arrays are in ``correlations.zarr``; raw channels are in a group below the modes."""
    path = f"{escape_name(layer)}/{escape_name(quantity)}"
    return f"{path}/channels" if unit == CHANNEL else path


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes_atomically(path, buffer.getvalue())


def write_array(group: Any, name: str, values: Tensor) -> None:
    """Write a tensor as a Zarr array, in chunks of whole rows of at most 16 MB."""
    array = values.detach().cpu().numpy()
    row_bytes = max(1, array[:1].nbytes)
    rows = max(1, min(len(array), CHUNK_BYTES // row_bytes))
    chunks = (rows, *(max(1, size) for size in array.shape[1:]))
    group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)[...] = array


class _ArrayFolder:
    """A Zarr group that takes its place only when it is complete: at the end of a block that raises nothing."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._discard()
        try:
            self.root = zarr.open_group(self._partial, mode="w-", attributes={"format": 1})
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> zarr.Group:
        return self.root

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        if self._path.exists():
            shutil.rmtree(self._path)
        self._partial.rename(self._path)

    def _discard(self) -> None:
        """Remove what was written, or what a killed process left."""
        if self._partial.exists():
            shutil.rmtree(self._partial)


def _write_histogram(group: Any, name: str, distribution: Distribution) -> None:
    write_array(group, name, distribution.histogram)
    group[name].attrs.update({"low": distribution.low, "high": distribution.high, "undefined": distribution.undefined})


def _read_correlations(group: Any, part: str) -> Correlations:
    def read(name: str) -> Tensor:
        return torch.from_numpy(np.asarray(group[name][...]))

    attributes = group[part].attrs
    return Correlations(
        rows=attributes["rows"],
        samples=attributes["samples"],
        class_samples=read(f"{part}_class_samples"),
        frequency=read(f"{part}_frequency"),
        mean_when_on=read(f"{part}_mean_when_on"),
        correlation=read(part),
    )


# ---- A run's mode summary, as a notebook reads it


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
