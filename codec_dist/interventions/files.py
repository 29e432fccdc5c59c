"""The three Parquet files that the stage leaves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.trials import AREAS, CURVES, TRIALS, areas, curves
from codec_dist.utils import read_tables, write_bytes_atomically

SCHEMAS = {"trials": TRIALS, "curves": CURVES, "auc": AREAS}


@dataclass(frozen=True, eq=False)
class InterventionResults:
    """The causal tests of a run: single trials, their mean curves, and the areas under those."""

    trials: pa.Table
    """layer, ranking, draw, kind, percentage, channels, target, off_target, ratio_target, ratio_off_target."""
    curves: pa.Table
    """layer, ranking, kind, percentage, channels, role, ratio, standard_error, trials."""
    auc: pa.Table
    """layer, ranking, kind, auc_target, auc_off_target, relative_auc."""


def write_results(directory: Path, tables: Sequence[pa.Table]) -> InterventionResults:
    """Write ``trials.parquet``, ``curves.parquet`` and ``auc.parquet``, each whole or not at all.

    Args:
        directory: folder of the stage; made when missing.
        tables: trials as :func:`trials` returns them, one table per layer.
    """
    joined = pa.concat_tables([TRIALS.empty_table(), *tables])
    curve_table = curves(joined)
    results = InterventionResults(joined, curve_table, areas(curve_table))
    for name in SCHEMAS:
        buffer = io.BytesIO()
        pq.write_table(getattr(results, name), buffer)
        write_bytes_atomically(Path(directory) / f"{name}.parquet", buffer.getvalue())
    return results


def read_results(directory: Path) -> InterventionResults:
    """Read what :func:`write_results` wrote.

    Raises:
        InterventionError: a file is missing or is not such a table.
    """
    tables = read_tables(directory, SCHEMAS, InterventionError, "intervene")
    return InterventionResults(**tables)
