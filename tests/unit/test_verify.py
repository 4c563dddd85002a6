"""Verifying an output: everything that can be wrong with it is found, and repairing makes the next run redo it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.plans import plan_of
from tinysam.cli import main
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError
from tinysam.lake.plan import Shard, todo, write_index
from tinysam.lake.run_record import RunRecord
from tinysam.lake.shards import read_shard, shard_url, write_shard
from tinysam.verify import repair, verify

FINGERPRINT = "0123456789abcdef"
STATUSES = ["ok", "ok", "truncated"]


def make_index(count: int) -> pa.Table:
    rows = [{"image_id": f"{i:02d}.jpg", "uri": f"s3://lake/{i:02d}.jpg", "offset": 0, "size": 1} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def make_rows(shard: Shard) -> pa.Table:
    mask = {"size": [4, 4], "counts": "04h0", "bbox": [0, 0, 1, 4], "area": 4, "predicted_iou": 0.5}
    ids = shard.rows["image_id"].to_pylist()
    rows = [
        {"image_id": name, "uri": "", "status": status, "masks": [mask] * 50 if status == "ok" else None}
        for name, status in zip(ids, STATUSES, strict=False)
    ]
    return pa.Table.from_pylist(rows, schema=schema.MASKS)


def write(output: str, shard: Shard, rows: pa.Table | None = None, **changes: str) -> None:
    rows = make_rows(shard) if rows is None else rows
    statuses = rows["status"].to_pylist()
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    metadata = {"schema_version": str(schema.SCHEMA_VERSION), "fingerprint": FINGERPRINT, "counts": json.dumps(counts)}
    write_shard(f"{output}/shards", shard.shard_id, rows, metadata | changes)


@pytest.fixture
def output(tmp_path: Path) -> tuple[str, list[Shard]]:
    """A finished output of four shards, and its plan."""
    url = str(tmp_path / "output")
    plan = plan_of(make_index(11), images_per_shard=3)
    RunRecord(job="label_images", config={}, fingerprint=FINGERPRINT).write(url)
    write_index(url, plan)
    for shard in plan:
        write(url, shard)
    return url, plan


Output = tuple[str, list[Shard]]


def test_a_whole_output_is_whole(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = output
    result = verify(url)
    assert result.ok
    assert (result.shards, result.images, result.counts) == (4, 11, {"ok": 8, "truncated": 3})
    assert main(["verify", url]) == 0
    assert "11 images in 4 shards are whole: 8 ok, 3 truncated" in capsys.readouterr().out


def shifted(rows: pa.Table, names: list[str]) -> pa.Table:
    return rows.set_column(0, schema.MASKS.field("image_id"), pa.array(names))


BROKEN: dict[str, tuple[Callable[[str, Shard], None], str]] = {
    "a row too few": (lambda url, s: write(url, s, make_rows(s).slice(0, 2)), "2 rows, and 3 were planned"),
    "an image twice": (lambda url, s: write(url, s, shifted(make_rows(s), ["03.jpg"] * 3)), "in it twice"),
    "other images": (
        lambda url, s: write(url, s, shifted(make_rows(s), ["a", "b", "c"])),
        "not those that were planned",
    ),
    "another run": (lambda url, s: write(url, s, fingerprint="f" * 16), "fingerprint is ffffffffffffffff"),
    "another version": (lambda url, s: write(url, s, schema_version="0"), "schema version is 0"),
    "wrong counts": (lambda url, s: write(url, s, counts='{"ok": 3}'), "count of statuses"),
    "other columns": (
        lambda url, s: write(url, s, make_rows(s).select(["image_id", "uri", "status"])),
        "columns are not those of label_images",
    ),
    "cut short": (lambda url, s: cut(Path(shard_url(url, s.shard_id))), "not a whole parquet file"),
    "empty": (lambda url, s: Path(shard_url(url, s.shard_id)).write_bytes(b""), "not a whole parquet file"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_shard_is_found_and_deleted_and_no_other(
    case: str, output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    url, plan = output
    break_, message = BROKEN[case]
    break_(url, plan[1])
    [finding] = verify(url).findings
    assert (finding.kind, finding.url) == ("broken", shard_url(url, plan[1].shard_id))
    assert message in finding.message

    assert main(["verify", url]) == 1
    assert "1 broken" in capsys.readouterr().err
    assert todo(plan, url) == []
    assert main(["verify", url, "--repair"]) == 1
    assert todo(plan, url) == [plan[1]]
    write(url, plan[1])
    assert main(["verify", url]) == 0


def test_every_flipped_byte_of_the_data_is_found(output: Output) -> None:
    url, plan = output
    path = Path(shard_url(url, plan[0].shard_id))
    whole = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    found = 0
    group = metadata.row_group(0)
    for column in range(group.num_columns):
        chunk = group.column(column)
        place = chunk.data_page_offset + chunk.total_compressed_size - 1
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        found += not verify(url).ok
    assert found == group.num_columns


def test_missing_shards_are_told_from_broken_ones(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    url, plan = output
    for shard in plan[2:]:
        Path(shard_url(url, shard.shard_id)).unlink()
    assert [finding.kind for finding in verify(url).findings] == ["missing"] * 2
    assert main(["verify", url]) == 1
    assert capsys.readouterr().err.endswith("(2 missing): run the job again\n")


def test_shards_of_no_plan_are_deleted_and_strangers_files_are_not(output: Output) -> None:
    url, plan = output
    stranger, leftover = Path(url, "shards", "notes.txt"), Path(url, "shards", "shard-00009-0badf00d.parquet")
    stranger.write_text("mine")
    leftover.write_bytes(Path(shard_url(url, plan[0].shard_id)).read_bytes())
    result = verify(url)
    assert {finding.kind for finding in result.findings} == {"foreign"}
    assert repair(result) == [str(leftover)]
    assert stranger.exists()


def test_a_damaged_index_is_found_and_deleted(output: Output) -> None:
    url, plan = output
    index = Path(url, "index.parquet")
    rows = pq.read_table(index)
    changed = rows.set_column(1, schema.INDEX.field("uri"), pa.array(["s3://elsewhere"] * rows.num_rows))
    for content in (b"rubbish", changed, rows.slice(1), pa.concat_tables([rows, rows.slice(0, 1)])):
        if isinstance(content, bytes):
            index.write_bytes(content)
        else:
            pq.write_table(content, index)
        [finding] = verify(url).findings
        assert (finding.kind, finding.url) == ("index", str(index))
    assert repair(verify(url)) == [str(index)]
    write_index(url, plan)
    assert verify(url).ok


def test_shards_of_other_jobs_are_compared_with_each_other(output: Output) -> None:
    url, plan = output
    RunRecord(job="evaluate model", config={}, fingerprint=FINGERPRINT).write(url)
    assert verify(url).ok
    write(url, plan[3], make_rows(plan[3]).drop_columns(["masks"]))
    [finding] = verify(url).findings
    assert "columns" in finding.message


def test_a_folder_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LakeError, match=r"no run\.json"):
        verify(str(tmp_path))
    assert main(["verify", str(tmp_path)]) == 1
    assert "run.json" in capsys.readouterr().err


def test_whole_shards_are_left_as_they_were(output: Output) -> None:
    url, plan = output
    Path(shard_url(url, plan[0].shard_id)).unlink()
    before = {shard.shard_id: read_shard(shard_url(url, shard.shard_id)) for shard in plan[1:]}
    assert repair(verify(url)) == []
    assert all(read_shard(shard_url(url, name)).equals(rows) for name, rows in before.items())
