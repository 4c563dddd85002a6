"""The plan: which images make up which shard, decided by the index alone, before any work starts.

Names and contents never depend on timing or on the number of workers, so the work that is left after a crash is the
plan without what the output folder already lists.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, join, list_files, redact_url, write_once
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.shards import SHARDS_FOLDER

INDEX_FILE = "index.parquet"

_ROW_GROUP_SIZE = 8192  # what a worker reads to find the rows of a shard: about a megabyte
_REMEDY = "Delete it and run the job that wrote it again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Images that are processed together and written as one object."""

    shard_id: str
    """``shard-<number>-<hash>``: the position in the plan, and 8 hexadecimal digits that change with the rows."""
    start: int
    """Its first row in the plan's index."""
    num_rows: int
    """Its images."""
    index: pa.Table = dataclasses.field(repr=False, compare=False)
    """``schema.INDEX`` of the whole plan, shared by its shards: a plan of millions of images has no second copy."""

    @property
    def rows(self) -> pa.Table:
        """``schema.INDEX`` of its images, ``shard_id`` set."""
        names = pa.repeat(pa.scalar(self.shard_id, pa.string()), self.num_rows)
        return _set_shard_id(self.index.slice(self.start, self.num_rows), names)


def plan_shards(index: pa.Table, *, images_per_shard: int) -> list[Shard]:
    """Cuts an index into shards of neighbours.

    Args:
        index: ``schema.INDEX``, sorted by ``image_id`` as ``build_index`` returns it.
        images_per_shard: Rows of each shard; the last may have fewer.

    Raises:
        ValueError: If ``images_per_shard`` is not positive.
    """
    return _cut(index, 0, images_per_shard, first_number=0)


def planned_shards(index: pa.Table) -> list[Shard]:
    """The shards of an index whose ``shard_id`` is set, as ``read_index`` returns it.

    Raises:
        ValueError: If a row has no shard, or the rows of one are not neighbours.
    """
    names = index.column("shard_id").combine_chunks()
    runs = pc.run_end_encode(names, run_end_type=pa.int64())
    ends, shard_ids = runs.run_ends.to_pylist(), runs.values.to_pylist()
    if None in shard_ids or len(set(shard_ids)) < len(shard_ids):
        raise ValueError("its images are not in order of their shards")
    return [
        Shard(shard_id=shard_id, start=start, num_rows=end - start, index=index)
        for shard_id, start, end in zip(shard_ids, [0, *ends][:-1], ends, strict=True)
    ]


def extend_plan(plan: Sequence[Shard], lake: pa.Table, *, images_per_shard: int) -> list[Shard]:
    """Adds the images that a lake has gained as new shards behind those of a plan, which stay as they are.

    Images are known by their ids: those that are gone from the lake stay in the plan, and an image that was replaced
    under its name is not looked at again.

    Args:
        plan: What was planned before; may be empty.
        lake: ``schema.INDEX`` of the lake as it is now, sorted by ``image_id``.
        images_per_shard: Rows of each new shard; the last may have fewer.

    Raises:
        ValueError: If ``images_per_shard`` is not positive.
    """
    if not plan:
        return plan_shards(lake, images_per_shard=images_per_shard)
    known = plan[0].index
    is_new = pc.invert(pc.is_in(lake.column("image_id"), value_set=known.column("image_id")))
    index = pa.concat_tables([known, lake.filter(is_new)])
    before = [dataclasses.replace(shard, index=index) for shard in plan]
    return before + _cut(index, known.num_rows, images_per_shard, first_number=len(plan))


def write_index(output_url: str, plan: Sequence[Shard]) -> None:
    """Writes ``<output_url>/index.parquet``: ``schema.INDEX`` of all shards, ``shard_id`` set.

    Raises:
        LakeError: If the storage refuses.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema.INDEX, compression="zstd", write_page_checksum=True) as writer:
        if plan:
            index = plan[0].index
            sizes = pa.array([shard.num_rows for shard in plan], pa.int64())
            shard_of_row = pa.array(np.repeat(np.arange(len(plan)), sizes))
            shard_ids = pa.array([shard.shard_id for shard in plan], pa.string())
            for start in range(0, index.num_rows, _ROW_GROUP_SIZE):
                names = shard_ids.take(shard_of_row[start : start + _ROW_GROUP_SIZE])
                writer.write_table(_set_shard_id(index.slice(start, _ROW_GROUP_SIZE), names))
    write_once(join(output_url, INDEX_FILE), sink.getvalue().to_pybytes())


def read_index(output_url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads ``<output_url>/index.parquet`` back, or only some of its columns.

    Raises:
        MissingError: If it is not there.
        LakeError: If it is damaged.
    """
    with open_parquet(join(output_url, INDEX_FILE), remedy=_REMEDY, whole=columns is None) as parquet:
        return parquet.read(columns=None if columns is None else list(columns))


def read_plan(output_url: str) -> list[Shard]:
    """Reads the plan that ``<output_url>/index.parquet`` holds.

    Raises:
        MissingError: If it is not there.
        LakeError: If it is damaged.
    """
    try:
        return planned_shards(read_index(output_url))
    except ValueError as error:
        url = redact_url(join(output_url, INDEX_FILE))
        raise LakeError(f"{url} is not the index of a job: {error}. {_REMEDY}") from error


class IndexReader:
    """Reads parts of ``<output_url>/index.parquet``; the row groups around them stay in memory for the next call."""

    def __init__(self, output_url: str) -> None:
        self._url = join(output_url, INDEX_FILE)
        self._ends: list[int] = []
        self._groups: dict[int, pa.Table] = {}

    def read(self, start: int, num_rows: int) -> pa.Table:
        """Reads ``num_rows`` rows from ``start`` on, at least one: ``schema.INDEX``.

        Raises:
            LakeError: If the index is missing, damaged, or has no such rows.
        """
        if not self._covered(start, num_rows):
            with open_parquet(self._url, remedy=_REMEDY) as parquet:
                footer = parquet.metadata
                sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
                self._ends = list(itertools.accumulate(sizes))
                if start + num_rows > footer.num_rows:
                    raise LakeError(f"{redact_url(self._url)} has fewer rows than planned. {_REMEDY}")
                self._groups = {group: parquet.read_row_group(group) for group in self._wanted(start, num_rows)}
        wanted = self._wanted(start, num_rows)
        rows = pa.concat_tables([self._groups[group] for group in wanted])
        return rows.slice(start - (self._ends[wanted[0] - 1] if wanted[0] else 0), num_rows)

    def _wanted(self, start: int, num_rows: int) -> range:
        last = bisect.bisect_right(self._ends, start + num_rows - 1)
        return range(bisect.bisect_right(self._ends, start), last + 1)

    def _covered(self, start: int, num_rows: int) -> bool:
        return bool(self._ends) and all(group in self._groups for group in self._wanted(start, num_rows))


def todo(plan: Sequence[Shard], output_url: str) -> list[Shard]:
    """Returns the shards that ``<output_url>/shards`` does not hold yet, in the plan's order.

    Raises:
        LakeError: If the output cannot be listed. A folder that does not exist yet holds nothing.
    """
    urls = list_files(join(output_url, SHARDS_FOLDER), "*.parquet")
    done = {url.rsplit("/", 1)[-1].removesuffix(".parquet") for url in urls}
    return [shard for shard in plan if shard.shard_id not in done]


def content_hash(rows: pa.Table) -> str:
    """8 hexadecimal digits that change with index rows, whatever shard they are in and however they are chunked."""
    return _hash_values(_plain_columns(rows), 0, rows.num_rows)


def _cut(index: pa.Table, first_row: int, images_per_shard: int, *, first_number: int) -> list[Shard]:
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard}; it must be at least 1")
    shards: list[Shard] = []
    # Python values of many shards at a time: fetching them shard by shard would take most of the time.
    block = max(_ROW_GROUP_SIZE // images_per_shard, 1) * images_per_shard
    for block_start in range(first_row, index.num_rows, block):
        rows = index.slice(block_start, block)
        columns = _plain_columns(rows)
        for start in range(0, rows.num_rows, images_per_shard):
            num_rows = min(images_per_shard, rows.num_rows - start)
            digits = _hash_values(columns, start, num_rows)
            shard_id = f"shard-{first_number + len(shards):05d}-{digits}"
            shards.append(Shard(shard_id=shard_id, start=block_start + start, num_rows=num_rows, index=index))
    return shards


def _set_shard_id(rows: pa.Table, names: pa.Array | pa.ChunkedArray) -> pa.Table:
    position = schema.INDEX.get_field_index("shard_id")
    return rows.set_column(position, schema.INDEX.field(position), names)


def _plain_columns(rows: pa.Table) -> dict[str, list[Any] | None]:
    """Values that JSON has, by column in the order of the names; None for a column of nulls alone."""
    columns: dict[str, list[Any] | None] = {}
    for name in sorted(set(rows.column_names) - {"shard_id"}):
        column = rows.column(name)
        if column.null_count == rows.num_rows:
            columns[name] = None
        elif pa.types.is_binary(column.type):
            values = column.to_pylist()
            columns[name] = [value if value is None else base64.b64encode(value).decode() for value in values]
        else:
            columns[name] = column.to_pylist()
    return columns


def _hash_values(columns: Mapping[str, list[Any] | None], start: int, num_rows: int) -> str:
    digest = hashlib.sha256()
    for name, column in columns.items():
        values = [None] * num_rows if column is None else column[start : start + num_rows]
        digest.update(json.dumps([name, values], separators=(",", ":")).encode())
    return digest.hexdigest()[:8]
