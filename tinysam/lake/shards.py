"""Shards: parquet files of a few dozen rows, each one object, written whole or not at all.

Row groups of 8 rows, zstd 1, no dictionaries, and no statistics on the blobs: measured as the fastest both ways, and
read by pyarrow, pandas, DuckDB, Polars and Hugging Face datasets alike. Each page carries parquet's own checksum, which
``tinysam verify`` checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake.filesystem import LakeError, join, redact_url, write_once
from tinysam.lake.parquet_file import open_parquet

SHARDS_FOLDER = "shards"
"""Folder of an output that holds its shards: ``<output>/shards/<shard_id>.parquet``."""

ROW_GROUP_SIZE = 8
COUNTS_KEY = "counts"
"""Key of a shard's metadata: JSON of its images by status, so that a resumed run can count without reading rows."""

FINGERPRINT_KEY = "fingerprint"
"""Key of a shard's metadata: the fingerprint of the run that made it, as in ``run.json``."""

SCHEMA_VERSION_KEY = "schema_version"
"""Key of a shard's metadata: ``schema.SCHEMA_VERSION`` when it was made."""

_SUFFIX = ".parquet"
_REMEDY = "Delete it and run the job again: it makes what is missing."
_STATISTICS = ("image_id", "uri", "status")  # what queries filter by


class ShardError(LakeError):
    """A shard or index that is not what it should be."""


def write_shard(folder_url: str, shard_id: str, rows: pa.Table, metadata: Mapping[str, str]) -> None:
    """Writes ``<folder_url>/<shard_id>.parquet``: the object's existence records that the shard is done.

    The bytes depend on the rows, their schema and the metadata alone (and on pyarrow's version), not on how the
    rows are chunked or the metadata ordered, so a retry writes the same object.

    Args:
        folder_url: Where the shards lie, ``join(output, SHARDS_FOLDER)``.
        shard_id: The shard's name in the plan.
        rows: All of its rows.
        metadata: Goes into the file's key-value metadata.

    Raises:
        LakeError: If the storage refuses.
    """
    write_once(join(folder_url, shard_id + _SUFFIX), serialize(rows, metadata))


def serialize(rows: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Makes the bytes of a shard; see ``write_shard``."""
    table = rows.combine_chunks().replace_schema_metadata(dict(sorted(metadata.items())) or None)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_SIZE,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=[name for name in table.column_names if name in _STATISTICS],
    )
    return sink.getvalue().to_pybytes()


def shard_url(output_url: str, shard_id: str) -> str:
    """Where the shard of an output lies: ``<output_url>/shards/<shard_id>.parquet``."""
    return join(output_url, SHARDS_FOLDER, shard_id + _SUFFIX)


def read_shard(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a shard.

    Args:
        url: The parquet file.
        columns: Only these, so that the embeddings need not travel where the masks are enough.

    Raises:
        MissingError: If it is not there.
        ShardError: If it is not a whole parquet file, or lacks a column.
    """
    with open_parquet(url, remedy=_REMEDY, whole=columns is None, error_type=ShardError) as parquet:
        missing = sorted(set(columns or ()) - set(parquet.schema_arrow.names))
        if missing:
            raise ShardError(f"{redact_url(url)} has no column {', '.join(missing)}: another job wrote it.")
        return parquet.read(columns=None if columns is None else list(columns))


def read_shard_metadata(url: str) -> dict[str, str]:
    """Reads a shard's key-value metadata from its footer alone.

    Raises:
        MissingError: If it is not there.
        ShardError: If it is not a whole parquet file.
    """
    with open_parquet(url, remedy=_REMEDY, error_type=ShardError) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}
