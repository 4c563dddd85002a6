"""The plan: which images make up which shard, decided by the index alone, before any work starts.

Names and contents never depend on timing or on the number of workers, so the work that is left after a crash is the
plan without what the output folder already lists.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tinysam.lake import schema
from tinysam.lake.filesystem import join, list_files, write_once
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.shards import SHARDS_FOLDER

INDEX_FILE = "index.parquet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Images that are processed together and written as one object."""

    shard_id: str
    """``shard-<number>-<hash>``: the position in the plan, and 8 hexadecimal digits that change with the rows."""
    rows: pa.Table
    """``schema.INDEX`` with ``shard_id`` set."""


def plan_shards(index: pa.Table, *, images_per_shard: int) -> list[Shard]:
    """Cuts an index into shards of neighbours.

    Args:
        index: ``schema.INDEX``, sorted by ``image_id`` as ``build_index`` returns it.
        images_per_shard: Rows of each shard; the last may have fewer.

    Raises:
        ValueError: If ``images_per_shard`` is not positive.
    """
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard}; it must be at least 1")
    shards = []
    for number, start in enumerate(range(0, index.num_rows, images_per_shard)):
        rows = index.slice(start, images_per_shard)
        shard_id = f"shard-{number:05d}-{_content_hash(rows)}"
        column = schema.INDEX.get_field_index("shard_id")
        names = pa.array([shard_id] * rows.num_rows, pa.string())
        shards.append(Shard(shard_id=shard_id, rows=rows.set_column(column, schema.INDEX.field(column), names)))
    return shards


def write_index(output_url: str, plan: Sequence[Shard]) -> None:
    """Writes ``<output_url>/index.parquet``: ``schema.INDEX`` of all shards, ``shard_id`` set.

    Raises:
        LakeError: If the storage refuses.
    """
    index = pa.concat_tables([shard.rows for shard in plan]) if plan else schema.INDEX.empty_table()
    sink = pa.BufferOutputStream()
    pq.write_table(index.combine_chunks(), sink, compression="zstd")
    write_once(join(output_url, INDEX_FILE), sink.getvalue().to_pybytes())


def read_index(output_url: str) -> pa.Table:
    """Reads ``<output_url>/index.parquet`` back.

    Raises:
        LakeError: If it is missing or damaged.
    """
    remedy = "Delete it and run the job that wrote it again."
    with open_parquet(join(output_url, INDEX_FILE), remedy=remedy, whole=True) as parquet:
        return parquet.read()


def todo(plan: Sequence[Shard], output_url: str) -> list[Shard]:
    """Returns the shards that ``<output_url>/shards`` does not hold yet, in the plan's order.

    Raises:
        LakeError: If the output cannot be listed. A folder that does not exist yet holds nothing.
    """
    urls = list_files(join(output_url, SHARDS_FOLDER), "*.parquet")
    done = {url.rsplit("/", 1)[-1].removesuffix(".parquet") for url in urls}
    return [shard for shard in plan if shard.shard_id not in done]


def _content_hash(rows: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in sorted(set(rows.column_names) - {"shard_id"}):
        values = rows.column(name).to_pylist()
        plain = [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in values]
        digest.update(json.dumps([name, plain], separators=(",", ":")).encode())
    return digest.hexdigest()[:8]
