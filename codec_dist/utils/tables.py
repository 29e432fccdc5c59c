"""Parquet tables with known columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from codec_dist.utils.errors import CodecError

if TYPE_CHECKING:
    import pyarrow as pa


def read_tables(
    directory: Path, schemas: Mapping[str, "pa.Schema"], error: type[CodecError], stage: str
) -> dict[str, "pa.Table"]:
    """Read ``NAME.parquet`` for every name of ``schemas``.

    Args:
        directory: folder of the files.
        schemas: columns of each table, exactly.
        error: class of the errors raised.
        stage: the stage that writes the files, for the message.

    Raises:
        CodecError: of that class; a file is missing or is not such a table.
    """
    # The packages that use numbers alone import this package, and do without Arrow.
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    for name, schema in schemas.items():
        path = Path(directory) / f"{name}.parquet"
        try:
            tables[name] = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as cause:
            raise error(f"cannot read {path} ({cause}): run the stage `{stage}` first") from cause
        if tables[name].schema != schema:
            raise error(f"{path} has the columns {tables[name].schema.names}, not {schema.names}")
    return tables
