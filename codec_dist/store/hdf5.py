"""The layout of the CODEC authors' files (HDF5): ``<layer index>/<kind>s/<sign>`` [rows, channels], ``targets`` [rows].

Kinds are contributions, activations and gradients; ``targets`` are labels. Needs the package h5py (extra ``hdf5``).
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from codec_dist.store.errors import StoreError
from codec_dist.store.layout import DTYPES
from codec_dist.store.lease import Lease
from codec_dist.store.ledger import Ledger
from codec_dist.store.quantities import KINDS, SIGNS
from codec_dist.store.reading import ContributionStore
from codec_dist.store.sample_tables import finish_store
from codec_dist.store.writing import BlockWriter, create_store
from codec_dist.utils import Progress, hash_file

LABELS = "targets"
ROWS_PER_SHARD = 4096


def import_hdf5(
    file: str | Path,
    store: str | Path,
    *,
    layers: Sequence[str] | None = None,
    target: str = "imported",
    rows_per_shard: int = ROWS_PER_SHARD,
) -> None:
    """Make a store of the numbers in a file of the authors' layout; goes on where it was stopped.

    Rows become pseudo-shards ``rows-000000``, ... with row numbers as keys and the file's labels; predictions
    and values of the target are null. Negative parts that are stored without sign are negated.

    Args:
        file: the HDF5 file.
        store: folder or URL of the store.
        layers: layer keys in the order of the layer indices; by default the indices are the names.
        target: name of the target that the contributions explain; the file does not tell.
        rows_per_shard: rows of a pseudo-shard, and so of a block.

    Raises:
        StoreError: h5py is missing, the file is none or has another layout, or the store was made of others.
    """
    with _opened(file) as data:
        source = _Source.of(data, file, layers)
        shards = [
            (f"rows-{number:06d}", min(rows_per_shard, source.rows - first))
            for number, first in enumerate(range(0, source.rows, rows_per_shard))
        ]
        with Lease(store) as lease, Progress("import", source.rows, "rows") as progress:
            create_store(
                store,
                identity={"imported": {"sha256": hash_file(Path(file))}},
                layers=source.layers,
                targets=[target],
                quantities=list(source.paths),
                shards=shards,
                dtype=source.dtype,
            )
            writer, pending = BlockWriter(store), set(Ledger(store).pending())
            for number, (_, rows) in enumerate(shards):
                if number in pending:
                    lease.check()
                    first = number * rows_per_shard
                    writer.write(number, source.values(first, rows), source.samples(first, rows))
                progress.advance(rows)
            finish_store(store)


def export_hdf5(store: str | Path, file: str | Path, *, target: str | None = None) -> None:
    """Write the numbers of a complete store into a new file of the authors' layout.

    Rows are in the order of the table of samples; labels are −1 for samples without one. Layer indices count
    from 0 in the order of the store; each group's attribute ``name`` is the layer key.

    Args:
        store: folder or URL of the store.
        file: the HDF5 file, which must not exist.
        target: the target whose contributions are written; by default the store's first.

    Raises:
        StoreError: h5py is missing, the store is not complete or has no such target, or the file exists.
    """
    source, path = ContributionStore(store), Path(file)
    if not source.complete:
        raise StoreError(f"the store {source.location} is not complete: run `codec-dist extract` first")
    names = _names_of_target(source, target)
    if path.exists():
        raise StoreError(f"cannot write {path}: there is such a file; choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        total = len(source) * len(names) * len(source.layers)
        with _h5py().File(temporary, "w") as data, Progress("export", total, "rows") as progress:
            data.attrs["identity"] = source.identity_hash
            data[LABELS] = source.samples["label"].fill_null(-1).to_numpy().astype(np.int64)
            for number, (layer, channels) in enumerate(source.layers.items()):
                data.create_group(str(number)).attrs["name"] = layer
                for name, (kind, sign) in names.items():
                    array = data[str(number)].create_dataset(
                        f"{kind}s/{sign}", (len(source), channels), source.info().dtype
                    )
                    for block in source.blocks(layer, name):
                        array[block.start : block.start + len(block.values)] = block.values
                        progress.advance(len(block.values))
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or ' '.join(str(error).split())}") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@dataclass(frozen=True)
class _Source:
    """What a file of the authors' layout holds."""

    arrays: dict[tuple[str, str], Any]
    """(layer key, quantity) → the HDF5 data set."""
    layers: dict[str, int]
    """Layer key → channels."""
    paths: dict[str, str]
    """Quantity → path of its data set below the layer's group."""
    labels: np.ndarray | None
    rows: int
    dtype: str

    @classmethod
    def of(cls, data: Any, file: str | Path, names: Sequence[str] | None) -> "_Source":
        """Look through an opened file.

        Raises:
            StoreError: it is not of the layout.
        """
        groups = sorted((name for name in data if name.isdecimal()), key=int)
        if not groups:
            found = ", ".join(data) or "none"
            raise StoreError(f"{file} has no groups named by layer indices (0, 1, ...): found {found}")
        names = groups if names is None else list(names)
        if len(names) != len(groups) or len(set(names)) < len(names):
            raise StoreError(f"{file} has {len(groups)} layers: {len(names)} names were given; give each layer its own")
        paths = _common_paths(data, groups, file)
        arrays = {
            (name, quantity): data[f"{group}/{path}"]
            for name, group in zip(names, groups)
            for quantity, path in paths.items()
        }
        layers: dict[str, int] = {}
        rows = next(iter(arrays.values())).shape[0]
        for (name, _), array in arrays.items():
            expected = [rows, layers.setdefault(name, array.shape[-1])]
            if list(array.shape) != expected:
                found = f"has shape {list(array.shape)}: expected [rows, channels], here {expected}"
                raise StoreError(f"{file}{array.name} {found}")
        dtype = str(np.result_type(*(array.dtype for array in arrays.values())))
        if dtype not in DTYPES:
            raise StoreError(f"{file} holds numbers of type {dtype}: expected {', '.join(DTYPES)}")
        if not rows:
            raise StoreError(f"{file} has no rows: there is nothing to import")
        return cls(arrays, layers, paths, _labels(data, file, rows), rows, dtype)

    def values(self, first: int, rows: int) -> dict[tuple[str, str], np.ndarray]:
        """Rows of every array, with the signs that a store keeps."""
        found = {name: array[first : first + rows].astype(self.dtype) for name, array in self.arrays.items()}
        return {
            # Subtracted, since the negative of 0 would be −0.
            name: 0 - values if name[1].endswith("negative") and values.min() >= 0 else values
            for name, values in found.items()
        }

    def samples(self, first: int, rows: int) -> pa.Table:
        """Their table of samples."""
        labels = None if self.labels is None else self.labels[first : first + rows]
        nothing = pa.nulls(rows, pa.float64())
        return pa.table(
            {
                "key": [str(first + row) for row in range(rows)],
                "label": pa.nulls(rows, pa.int32()) if labels is None else pa.array(labels, mask=labels < 0),
                "prediction": pa.nulls(rows, pa.int32()),
                "target_value": nothing,
                "baseline_value": nothing,
            }
        )


def _common_paths(data: Any, groups: list[str], file: str | Path) -> dict[str, str]:
    """Quantity → path below a layer's group, of what all layers hold."""
    every = {f"{kind}-{sign}": f"{kind}s/{sign}" for kind in KINDS for sign in SIGNS}
    held = [[quantity for quantity, path in every.items() if path in data[group]] for group in groups]
    if not held[0] or any(each != held[0] for each in held):
        found = "; ".join(f"{group}: {', '.join(each) or 'none'}" for group, each in zip(groups, held))
        raise StoreError(f"the layers of {file} must hold the same quantities, at least one: found {found}")
    return {quantity: every[quantity] for quantity in held[0]}


def _labels(data: Any, file: str | Path, rows: int) -> np.ndarray | None:
    if LABELS not in data:
        return None
    labels = np.asarray(data[LABELS])
    if labels.shape != (rows,) or not np.array_equal(labels, labels.astype(np.int64)):
        raise StoreError(
            f"{file}/{LABELS} has shape {list(labels.shape)} and type {labels.dtype}: expected {rows} whole numbers"
        )
    return labels.astype(np.int64)


def _names_of_target(store: ContributionStore, target: str | None) -> dict[str, tuple[str, str]]:
    """Quantity → kind and sign, of all but the contributions that explain other targets."""
    if target is not None and target not in store.targets:
        raise StoreError(
            f"the store {store.location} has no target {target!r}: it has {', '.join(store.targets) or 'none'}"
        )
    wanted = target or (store.targets[0] if store.targets else None)
    return {
        name: (facts.kind, facts.sign)
        for name, facts in store.stored.items()
        if facts.target is None or facts.target == wanted
    }


@contextmanager
def _opened(file: str | Path) -> Iterator[Any]:
    h5py = _h5py()
    try:
        data = h5py.File(file, "r")
    except OSError as error:
        reason = "there is no such file" if not Path(file).exists() else " ".join(str(error).split())
        raise StoreError(f"cannot read {file}: {reason}") from error
    with data:
        yield data


def _h5py() -> Any:
    try:
        return import_module("h5py")
    except ImportError as error:
        raise StoreError("HDF5 files need the package h5py: pip install 'codec_dist[hdf5]'") from error
