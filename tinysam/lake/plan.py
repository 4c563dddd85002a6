"""The plan: which images make up which shard, decided by the index alone, before any work starts.

Names and contents never depend on timing or on the number of workers, so the work that is left after a crash is the
plan without what the output folder already lists.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, explained, join, list_files, redact_url, write_stream_once
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.shards import SHARDS_FOLDER

INDEX_FILE = "index.parquet"

_ROW_GROUP_SIZE = 8192  # at most, or one shard: what a worker reads to find its rows, about a megabyte
_KNOWN_AT_ONCE = 1 << 20  # images that are looked up together: pyarrow hashes all known ids for each lookup
_REMEDY = "Delete it and run the job that wrote it again."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Images that are processed together and written as one object."""

    shard_id: str
    """``shard-<number>-<hash>``: the position in the plan, and 8 hexadecimal digits that change with the rows."""
    start: int
    """Its first row in the plan's index."""
    num_rows: int
    """Its images."""
    num_bytes: int
    """Of its images' files, as far as the listing told them."""
    sized: bool
    """Whether the listing told them all."""
    index: IndexReader = dataclasses.field(repr=False, compare=False)
    """Where its rows lie. A plan of ten million images keeps none of them in memory."""

    @property
    def rows(self) -> pa.Table:
        """``schema.INDEX`` of its images, ``shard_id`` set.

        Raises:
            LakeError: If the index cannot be read.
        """
        return self.index.read(self.start, self.num_rows)


def write_plan(folder: Path, images: Iterable[pa.RecordBatch], *, images_per_shard: int) -> list[Shard]:
    """Cuts an index into shards of neighbours, and writes it to ``<folder>/index.parquet`` on the way.

    Args:
        folder: On the local disk.
        images: ``schema.INDEX``, sorted by ``image_id`` as ``iter_index`` yields it. Its chunks make no difference.
        images_per_shard: Rows of each shard; the last may have fewer.

    Raises:
        LakeError: If the disk is full.
        ValueError: If ``images_per_shard`` is not positive.
    """
    _check(images_per_shard)
    with _writer(folder) as writer:
        return _cut(images, writer, images_per_shard, IndexReader(str(folder)))


def extend_plan(
    plan: Sequence[Shard], folder: Path, lake: Iterable[pa.RecordBatch], *, images_per_shard: int
) -> list[Shard]:
    """Adds the images that a lake has gained as new shards behind those of a plan, which stay as they are.

    Images are known by their ids: those that are gone from the lake stay in the plan, and an image that was replaced
    under its name is not looked at again.

    Args:
        plan: What was planned before, at least one shard.
        folder: On the local disk; the new index goes to ``<folder>/index.parquet``.
        lake: ``schema.INDEX`` of the lake as it is now, sorted by ``image_id``.
        images_per_shard: Rows of each new shard; the last may have fewer.

    Raises:
        LakeError: If the old index cannot be read, or the disk is full.
        ValueError: If ``images_per_shard`` is not positive.
    """
    _check(images_per_shard)
    before, after = plan[0].index, IndexReader(str(folder))
    known = pa.concat_tables(before.groups(["image_id"])).column("image_id")
    with _writer(folder) as writer:
        for group in before.groups():
            writer.write_table(group)
        gained = (
            batch
            for rows in _regrouped(lake, _KNOWN_AT_ONCE)
            for batch in rows.filter(pc.invert(pc.is_in(rows.column("image_id"), value_set=known))).to_batches()
        )
        new = _cut(gained, writer, images_per_shard, after, first_row=len(known), first_number=len(plan))
    return [*(dataclasses.replace(shard, index=after) for shard in plan), *new]


def write_index(output_url: str, plan: Sequence[Shard]) -> None:
    """Copies the index of a plan to ``<output_url>/index.parquet``: the plan is the output's from then on.

    Raises:
        LakeError: If the storage refuses.
    """
    with Path(plan[0].index.url).open("rb") as source:
        write_stream_once(join(output_url, INDEX_FILE), lambda file: shutil.copyfileobj(source, file))


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
        LakeError: If it is damaged, or no plan wrote it.
    """
    reader = IndexReader(output_url)
    shards: list[Shard] = []
    row = 0
    for rows in reader.groups(["shard_id", "size"]):
        runs = pc.run_end_encode(rows.column("shard_id").combine_chunks(), run_end_type=pa.int64())
        ends = runs.run_ends.to_numpy()
        starts = np.concatenate([[0], ends[:-1]])
        places = zip(runs.values.to_pylist(), starts.tolist(), ends.tolist(), strict=True)
        totals = zip(*_sizes(rows.column("size").to_numpy(), starts), strict=True)
        for (shard_id, start, end), (num_bytes, sized) in zip(places, totals, strict=True):
            shard = Shard(
                shard_id=shard_id,
                start=row + start,
                num_rows=end - start,
                num_bytes=num_bytes,
                sized=sized,
                index=reader,
            )
            if shards and shards[-1].shard_id == shard_id:  # the group before ended within it
                shard = _joined(shards.pop(), shard)
            shards.append(shard)
        row += rows.num_rows
    ids = {shard.shard_id for shard in shards}
    if None in ids or len(ids) < len(shards):
        reason = "its images are not in order of their shards"
        raise LakeError(f"{redact_url(reader.url)} is not the index of a job: {reason}. {_REMEDY}")
    return shards


class IndexReader:
    """Reads parts of ``<output_url>/index.parquet``; the row groups around them stay in memory for the next call."""

    def __init__(self, output_url: str) -> None:
        self.url = join(output_url, INDEX_FILE)
        self._ends: list[int] = []
        self._groups: dict[int, pa.Table] = {}

    def read(self, start: int, num_rows: int) -> pa.Table:
        """Reads ``num_rows`` rows from ``start`` on, at least one: ``schema.INDEX``. Threads may share a reader.

        Raises:
            LakeError: If the index is missing, damaged, or has no such rows.
        """
        groups = self._groups
        if not self._ends or any(group not in groups for group in self._wanted(start, num_rows)):
            with open_parquet(self.url, remedy=_REMEDY) as parquet:
                footer = parquet.metadata
                sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
                self._ends = list(itertools.accumulate(sizes))
                if start + num_rows > footer.num_rows:
                    raise LakeError(f"{redact_url(self.url)} has fewer rows than planned. {_REMEDY}")
                groups = {group: parquet.read_row_group(group) for group in self._wanted(start, num_rows)}
            self._groups = groups
        wanted = self._wanted(start, num_rows)
        rows = pa.concat_tables([groups[group] for group in wanted])
        return rows.slice(start - (self._ends[wanted[0] - 1] if wanted[0] else 0), num_rows)

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows in order, or only some of their columns, a row group at a time.

        Raises:
            MissingError: If the index is not there.
            LakeError: If it is damaged.
        """
        with open_parquet(self.url, remedy=_REMEDY) as parquet:
            for group in range(parquet.num_row_groups):
                yield parquet.read_row_group(group, columns=None if columns is None else list(columns))

    def _wanted(self, start: int, num_rows: int) -> range:
        last = bisect.bisect_right(self._ends, start + num_rows - 1)
        return range(bisect.bisect_right(self._ends, start), last + 1)


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


def _check(images_per_shard: int) -> None:
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard is {images_per_shard}; it must be at least 1")


@contextlib.contextmanager
def _writer(folder: Path) -> Iterator[pq.ParquetWriter]:
    path = folder / INDEX_FILE
    with (
        explained(str(path), writing=True),
        pq.ParquetWriter(path, schema.INDEX, compression="zstd", write_page_checksum=True) as writer,
    ):
        yield writer


def _cut(
    images: Iterable[pa.RecordBatch],
    writer: pq.ParquetWriter,
    images_per_shard: int,
    index: IndexReader,
    *,
    first_row: int = 0,
    first_number: int = 0,
) -> list[Shard]:
    shards: list[Shard] = []
    # A row group is a whole number of shards, so that a worker reads one. Python values are fetched for all of them at
    # once: shard by shard it would take most of the time.
    for rows in _regrouped(images, max(_ROW_GROUP_SIZE // images_per_shard, 1) * images_per_shard):
        columns = _plain_columns(rows)
        starts = np.arange(0, rows.num_rows, images_per_shard)
        ends = np.append(starts[1:], rows.num_rows)
        totals = zip(*_sizes(rows.column("size").to_numpy(), starts), strict=True)
        cut = [
            Shard(
                shard_id=f"shard-{number:05d}-{_hash_values(columns, start, end - start)}",
                start=first_row + start,
                num_rows=end - start,
                num_bytes=num_bytes,
                sized=sized,
                index=index,
            )
            for number, (start, end, (num_bytes, sized)) in enumerate(
                zip(starts.tolist(), ends.tolist(), totals, strict=True), start=first_number + len(shards)
            )
        ]
        names = pa.array([shard.shard_id for shard in cut], pa.string())
        writer.write_table(_set_shard_id(rows, names.take(pa.array(np.repeat(np.arange(len(cut)), ends - starts)))))
        first_row += rows.num_rows
        shards += cut
    return shards


def _regrouped(batches: Iterable[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``num_rows``, the last of which may have fewer."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += batch.num_rows
        while count >= num_rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, num_rows)
            count -= num_rows
            waiting = table.slice(num_rows).to_batches()
    if count:
        yield pa.Table.from_batches(waiting)


def _sizes(sizes: np.ndarray, starts: np.ndarray) -> tuple[list[int], list[bool]]:
    """Bytes of each part as far as they are known, and whether all are; parts begin at ``starts``."""
    known = np.add.reduceat(np.maximum(sizes, 0), starts)
    return known.tolist(), (np.minimum.reduceat(sizes, starts) >= 0).tolist()


def _joined(first: Shard, second: Shard) -> Shard:
    return dataclasses.replace(
        first,
        num_rows=first.num_rows + second.num_rows,
        num_bytes=first.num_bytes + second.num_bytes,
        sized=first.sized and second.sized,
    )


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
