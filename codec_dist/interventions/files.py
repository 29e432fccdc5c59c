"""The Parquet files that the stage leaves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from codec_dist.interventions.class_results import CLASSES, SUBJECTS, LayerResults
from codec_dist.interventions.errors import InterventionError
from codec_dist.interventions.uncertainty import AREAS, CURVES, NULLS, areas, curves, nulls
from codec_dist.utils import read_tables, write_bytes_atomically

RESULTS_FORMAT = 2
"""Number of the files' format. Format 1 counted a subject once per off-target class and had no nulls."""
_MARK = {b"format": str(RESULTS_FORMAT).encode()}
SCHEMAS = {
    name: schema.with_metadata(_MARK)
    for name, schema in (
        ("classes", CLASSES), ("subjects", SUBJECTS), ("curves", CURVES), ("auc", AREAS), ("nulls", NULLS)
    )
}  # fmt: skip
EARLIER_FILES = ("trials.parquet",)


@dataclass(frozen=True, eq=False)
class InterventionResults:
    """The causal tests of a run."""

    classes: pa.Table
    """Right answers per condition and class: layer, ranking, draw, kind, channels, target, class, images,
    right_before, right_after."""
    subjects: pa.Table
    """Ratios of each subject: layer, ranking, draw, kind, percentage, channels, target, ratio_target,
    ratio_off_target, selectivity."""
    curves: pa.Table
    """Means over subjects: layer, ranking, kind, percentage, channels, role, ratio, standard_error, subjects."""
    auc: pa.Table
    """Areas under the curves and relative AUC with its uncertainty, see :func:`areas`."""
    nulls: pa.Table
    """Statistics beside those of random rankings, see :func:`nulls`."""


def write_results(directory: Path, layers: Sequence[LayerResults], seed: int) -> InterventionResults:
    """Compute curves, areas and nulls, and write ``NAME.parquet`` for each table, each whole or not at all.

    Args:
        directory: folder of the stage; made when missing. Files of an earlier format are removed.
        layers: results as :func:`layer_results` returns them.
        seed: seed of the bootstrap.
    """
    classes = pa.concat_tables([CLASSES.empty_table(), *(layer.classes for layer in layers)])
    subjects = pa.concat_tables([SUBJECTS.empty_table(), *(layer.subjects for layer in layers)])
    results = InterventionResults(classes, subjects, curves(subjects), areas(subjects, seed), nulls(subjects))
    for name in SCHEMAS:
        buffer = io.BytesIO()
        pq.write_table(getattr(results, name).replace_schema_metadata(_MARK), buffer)
        write_bytes_atomically(Path(directory) / f"{name}.parquet", buffer.getvalue())
    for name in EARLIER_FILES:
        (Path(directory) / name).unlink(missing_ok=True)
    return results


def read_results(directory: Path) -> InterventionResults:
    """Read what :func:`write_results` wrote.

    Raises:
        InterventionError: a file is missing, is not such a table, or is of another format.
    """
    tables = read_tables(directory, SCHEMAS, InterventionError, "intervene")
    for name, table in tables.items():
        if not _is_current(table.schema):
            path = Path(directory) / f"{name}.parquet"
            raise InterventionError(f"{path} is not of format {RESULTS_FORMAT}: run the stage `intervene` again")
    return InterventionResults(**tables)


def results_are_current(directory: Path) -> bool:
    """Whether all files are there, can be read, and are of the present format; looks at their headers only."""
    try:
        return all(_is_current(pq.read_schema(Path(directory) / f"{name}.parquet")) for name in SCHEMAS)
    except (OSError, pa.ArrowInvalid):
        return False


def _is_current(schema: pa.Schema) -> bool:
    return (schema.metadata or {}).get(b"format") == _MARK[b"format"]
