from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import new_folder, plan_of
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, join, write_once
from tinysam.lake.plan import (
    IndexReader,
    content_hash,
    extend_plan,
    read_index,
    read_plan,
    todo,
    write_index,
    write_plan,
)
from tinysam.lake.shards import SHARDS_FOLDER, write_shard


def make_index(names: list[str], **overrides: object) -> pa.Table:
    rows = [
        {"image_id": name, "uri": f"s3://lake/{name}", "offset": 0, "size": 10, "annotations": b"[]", **overrides}
        for name in names
    ]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), unique=True, max_size=30)


@settings(deadline=None)
@given(names=NAMES, images_per_shard=st.integers(1, 12))
def test_every_image_is_in_one_shard_and_in_order(names: list[str], images_per_shard: int) -> None:
    index = make_index(sorted(names))
    plan = plan_of(index, images_per_shard=images_per_shard)
    planned = [name for shard in plan for name in shard.rows.column("image_id").to_pylist()]
    assert planned == sorted(names)
    assert all(shard.rows.schema == schema.INDEX for shard in plan)
    assert all(shard.rows.num_rows == images_per_shard for shard in plan[:-1])
    assert all(set(shard.rows.column("shard_id").to_pylist()) == {shard.shard_id} for shard in plan)
    assert len({shard.shard_id for shard in plan}) == len(plan)


def test_the_plan_depends_on_the_index_alone() -> None:
    names = [f"{number}.png" for number in range(10)]
    whole = make_index(names)
    chunked = pa.concat_tables([make_index(names[:3]), make_index(names[3:])])
    first = [shard.shard_id for shard in plan_of(whole, images_per_shard=4)]
    assert first == [shard.shard_id for shard in plan_of(chunked, images_per_shard=4)]
    assert [name[:12] for name in first] == ["shard-00000-", "shard-00001-", "shard-00002-"]
    planned_before = pa.concat_tables([shard.rows for shard in plan_of(whole, images_per_shard=3)])
    assert first == [shard.shard_id for shard in plan_of(planned_before, images_per_shard=4)]


@pytest.mark.parametrize(
    "change", [{"uri": "s3://other/1.png"}, {"offset": 5}, {"size": 11}, {"annotations": b"[1]"}, {"annotations": None}]
)
def test_a_changed_row_changes_its_shards_name_and_no_other(change: dict[str, object]) -> None:
    same = make_index(["1.png", "2.png"])
    before = plan_of(pa.concat_tables([same, make_index(["3.png"])]), images_per_shard=2)
    after = plan_of(pa.concat_tables([same, make_index(["3.png"], **change)]), images_per_shard=2)
    assert before[0].shard_id == after[0].shard_id
    assert before[1].shard_id != after[1].shard_id


def test_shard_names_are_stable_across_versions() -> None:
    # A new release must be able to resume what an older one began.
    (shard,) = plan_of(make_index(["a b/ü.png", "c.png"]), images_per_shard=2)
    assert shard.shard_id == "shard-00000-917979e0"


@pytest.mark.parametrize("images_per_shard", [3, 100, 9000])
def test_sizes_of_shards_are_summed_as_far_as_they_are_known(images_per_shard: int) -> None:
    sizes = np.where(np.arange(20_000) == 7, -1, np.arange(20_000))
    rows = [{"image_id": f"{i:05d}", "uri": "", "offset": 0, "size": size} for i, size in enumerate(sizes.tolist())]
    folder = new_folder()
    index = pa.Table.from_pylist(rows, schema=schema.INDEX)
    plan = write_plan(folder, index.to_batches(max_chunksize=999), images_per_shard=images_per_shard)
    assert [shard.sized for shard in plan] == [shard.start > 7 or shard.start + shard.num_rows <= 7 for shard in plan]
    parts = [sizes[shard.start : shard.start + shard.num_rows] for shard in plan]
    assert [shard.num_bytes for shard in plan] == [int(part[part >= 0].sum()) for part in parts]
    assert read_plan(str(folder)) == plan


def test_shards_hold_at_least_one_image() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan_of(make_index(["1.png"]), images_per_shard=0)


def test_what_the_output_lists_is_not_done_again(storage: str) -> None:
    plan = plan_of(make_index([f"{number}.png" for number in range(7)]), images_per_shard=2)
    assert todo(plan, storage) == plan
    write_shard(join(storage, SHARDS_FOLDER), plan[2].shard_id, plan[2].rows, {})
    write_once(join(storage, SHARDS_FOLDER, "shard-00001-00000000.parquet"), b"of another plan")
    write_once(join(storage, SHARDS_FOLDER, f".{plan[0].shard_id}.parquet.tmp"), b"half a shard")
    assert [shard.shard_id for shard in todo(plan, storage)] == [plan[i].shard_id for i in (0, 1, 3)]


def test_an_index_is_read_back_as_it_was_written(storage: str) -> None:
    plan = plan_of(make_index(["a b/ü.png", "c.png", "d.png"]), images_per_shard=2)
    write_index(storage, plan)
    index = read_index(storage)
    assert index.schema == schema.INDEX
    assert index.to_pylist() == [row for shard in plan for row in shard.rows.to_pylist()]


def test_a_damaged_index_is_explained(storage: str) -> None:
    write_once(join(storage, "index.parquet"), b"PAR1 rubbish PAR1")
    with pytest.raises(LakeError, match=r"index\.parquet is not a whole parquet file"):
        read_index(storage)


@settings(deadline=None)
@given(names=NAMES, images_per_shard=st.integers(1, 12))
def test_a_plan_is_found_again_in_its_index(names: list[str], images_per_shard: int) -> None:
    folder = new_folder()
    plan = write_plan(folder, make_index(sorted(names)).to_batches(), images_per_shard=images_per_shard)
    assert read_plan(str(folder)) == plan
    assert [shard.shard_id[-8:] for shard in plan] == [content_hash(shard.rows) for shard in plan]


@pytest.mark.parametrize("shard_ids", [[None, "a"], ["a", "b", "a"]])
def test_an_index_that_no_plan_wrote_is_refused(shard_ids: list[str | None]) -> None:
    index = make_index([str(number) for number in range(len(shard_ids))])
    column = schema.INDEX.get_field_index("shard_id")
    index = index.set_column(column, schema.INDEX.field(column), pa.array(shard_ids, pa.string()))
    folder = new_folder()
    pq.write_table(index, folder / "index.parquet")
    with pytest.raises(LakeError, match="order of their shards"):
        read_plan(str(folder))


@settings(deadline=None)
@given(names=NAMES.filter(bool), gained=NAMES, images_per_shard=st.integers(1, 5))
def test_images_that_a_lake_has_gained_become_shards_behind_those_there(
    names: list[str], gained: list[str], images_per_shard: int
) -> None:
    plan = plan_of(make_index(sorted(names)), images_per_shard=images_per_shard)
    # Half of the images are gone from the lake, which changes nothing.
    lake = make_index(sorted({*names[::2], *gained})).to_batches(max_chunksize=3)
    extended = extend_plan(plan, new_folder(), lake, images_per_shard=images_per_shard)
    assert extended[: len(plan)] == plan
    planned = [name for shard in extended for name in shard.rows["image_id"].to_pylist()]
    assert planned == sorted(names) + sorted(set(gained) - set(names))
    assert len({shard.shard_id for shard in extended}) == len(extended)
    assert extend_plan(extended, new_folder(), lake, images_per_shard=images_per_shard) == extended


@pytest.mark.parametrize("rows", [1, 8192, 8193, 20_000])
def test_parts_of_an_index_are_read_as_they_are_in_the_whole(rows: int, storage: str) -> None:
    plan = plan_of(make_index([f"{number:05d}" for number in range(rows)]), images_per_shard=100)
    write_index(storage, plan)
    assert read_plan(storage) == plan
    whole, reader = read_index(storage), IndexReader(storage)
    places = [(0, 1), (rows - 1, 1), (max(rows - 100, 0), min(rows, 100)), (0, rows), (rows // 2, 1)]
    for start, num_rows in places:
        assert reader.read(start, num_rows).equals(whole.slice(start, num_rows))
    with pytest.raises(LakeError, match="fewer rows than planned"):
        reader.read(rows - 1, 2)
