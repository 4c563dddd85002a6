from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinysam.lake import schema
from tinysam.lake.filesystem import MissingError, join, list_files, read_bytes, write_once
from tinysam.lake.shards import ShardError, read_shard, read_shard_metadata, serialize, write_shard

METADATA = {"teacher": "demo", "schema_version": "1", "codec": "fp16"}


@pytest.fixture
def rows(rng: np.random.Generator) -> pa.Table:
    mask = {
        "size": [64, 64],
        "counts": b"0P20",
        "bbox": [0.0, 1.0, 2.0, 3.0],
        "area": 6.0,
        "point_coords": [[1.0, 2.0]],
    }
    values = [
        {
            "image_id": f"a b/ü {number}.png",
            "uri": f"s3://lake/{number}",
            "status": "ok" if number % 5 else "truncated",
            "error": None if number % 5 else "why",
            "image": rng.bytes(50),
            "embedding": rng.bytes(4000) if number % 5 else None,
            "masks": [mask] * (number % 3) if number % 4 else None,
        }
        for number in range(20)
    ]
    return pa.Table.from_pylist(values, schema=schema.EMBEDDING)


def test_a_shard_is_read_back_as_it_was_written(storage: str, rows: pa.Table) -> None:
    write_shard(join(storage, "shards"), "shard-00000-01234567", rows, METADATA)
    (url,) = list_files(storage)
    assert url.endswith("/shards/shard-00000-01234567.parquet")
    table = read_shard(url)
    assert table.schema.equals(schema.EMBEDDING)
    assert table.to_pylist() == rows.to_pylist()
    assert read_shard_metadata(url) == METADATA


def test_the_same_rows_make_the_same_bytes(rows: pa.Table) -> None:
    data = serialize(rows, METADATA)
    assert serialize(rows, METADATA) == data
    assert serialize(rows, dict(reversed(METADATA.items()))) == data
    chunked = pa.concat_tables([rows.slice(0, 3), rows.slice(3, 11), rows.slice(14)])
    assert chunked.column("uri").num_chunks == 3
    assert serialize(chunked, METADATA) == data
    rebuilt = pa.Table.from_pylist(rows.to_pylist(), schema=schema.EMBEDDING)
    assert serialize(rebuilt, METADATA) == data
    window = pa.concat_tables([rows.slice(15), rows]).combine_chunks().slice(5)
    assert serialize(window, METADATA) == data


def test_leftover_metadata_of_the_table_is_not_written(rows: pa.Table) -> None:
    assert serialize(rows.replace_schema_metadata({"pandas": "noise"}), METADATA) == serialize(rows, METADATA)


def test_layout_is_the_measured_one(rows: pa.Table) -> None:
    metadata = pq.ParquetFile(pa.BufferReader(serialize(rows, METADATA))).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [8, 8, 4]
    columns = {}
    for position in range(metadata.num_columns):
        column = metadata.row_group(0).column(position)
        columns[column.path_in_schema] = column
        assert column.compression == "ZSTD"
        assert not {"PLAIN_DICTIONARY", "RLE_DICTIONARY"} & set(column.encodings)
    assert not columns["embedding"].is_stats_set
    assert not columns["image"].is_stats_set
    assert columns["image_id"].is_stats_set


def test_chosen_columns_are_read(storage: str, rows: pa.Table) -> None:
    write_shard(storage, "s", rows, {})
    table = read_shard(join(storage, "s.parquet"), ["image_id", "masks"])
    assert table.column_names == ["image_id", "masks"]
    assert table.to_pylist() == rows.select(["image_id", "masks"]).to_pylist()


def test_a_column_that_is_not_there_is_named(storage: str, rows: pa.Table) -> None:
    write_shard(storage, "s", rows, {})
    with pytest.raises(ShardError, match="has no column predicted_iou"):
        read_shard(join(storage, "s.parquet"), ["image_id", "predicted_iou"])


def test_a_shard_without_metadata_has_none(storage: str, rows: pa.Table) -> None:
    write_shard(storage, "s", rows, {})
    assert read_shard_metadata(join(storage, "s.parquet")) == {}


def test_a_missing_shard_is_explained(storage: str) -> None:
    for read in (read_shard, read_shard_metadata):
        with pytest.raises(MissingError, match="does not exist"):
            read(join(storage, "none.parquet"))


@pytest.mark.parametrize("keep", [0, 3, 10, 0.5, 0.99])
def test_a_cut_shard_is_explained(storage: str, rows: pa.Table, keep: float) -> None:
    data = serialize(rows, METADATA)
    url = join(storage, "s.parquet")
    write_once(url, data[: int(keep if keep > 1 else keep * len(data))])
    for read in (read_shard, read_shard_metadata):
        with pytest.raises(ShardError, match=r"is not a whole parquet file .*run the job again"):
            read(url)
    with pytest.raises(ShardError, match="is not a whole parquet file"):
        read_shard(url, ["image_id"])


def test_damage_inside_a_shard_never_goes_unexplained(storage: str, rows: pa.Table) -> None:
    data = serialize(rows, METADATA)
    url = join(storage, "s.parquet")
    refused = 0
    for position in range(4, len(data), 1009):
        write_once(url, data[:position] + bytes(4) + data[position + 4 :])
        try:
            assert read_shard(url).num_rows == rows.num_rows
        except ShardError:
            refused += 1
    assert refused
    assert read_bytes(url) != data
