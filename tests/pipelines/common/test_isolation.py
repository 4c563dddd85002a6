"""Which image is to blame, and what the ledger knows of workers that died."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from pipelines.common.isolation import process_one_by_one
from pipelines.common.ledger import IMAGE_ATTEMPTS, MAX_ATTEMPTS, TOGETHER_ATTEMPTS, Ledger
from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError

IDS = ["a", "b", "c"]


def index_rows() -> pa.Table:
    rows = [{"image_id": name, "uri": f"s3://lake/{name}", "offset": 0, "size": 1} for name in IDS]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def run(
    error_of: Callable[[str], Exception | None], given_up: frozenset[str] = frozenset()
) -> tuple[pa.Table, list[str]]:
    begun: list[str] = []

    def process(rows: pa.Table) -> pa.Table:
        [name] = rows["image_id"].to_pylist()
        if error := error_of(name):
            raise error
        return pa.Table.from_pylist([{"image_id": name, "uri": "", "status": "ok"}], schema=schema.MASKS)

    table = process_one_by_one(process, index_rows(), schema=schema.MASKS, given_up=given_up, begin_image=begun.append)
    return table, begun


def test_an_image_that_fails_alone_is_a_row_that_says_why() -> None:
    table, begun = run(lambda name: ValueError("odd") if name == "b" else None)
    assert table["image_id"].to_pylist() == IDS
    assert table["status"].to_pylist() == ["ok", "failed", "ok"]
    assert table["error"].to_pylist() == [None, "ValueError: odd", None]
    assert table["uri"][1].as_py() == "s3://lake/b"
    assert begun == IDS
    assert table.schema == schema.MASKS


@pytest.mark.parametrize("error", [MemoryError("3 TiB"), RuntimeError("[enforce fail] can't allocate memory: 9 bytes")])
def test_an_image_without_memory_is_recorded_even_where_no_other_is_good(error: Exception) -> None:
    table, _ = run(lambda name: error)
    assert table["status"].to_pylist() == ["out_of_memory"] * 3


def test_images_that_killed_their_worker_are_not_touched_again() -> None:
    table, begun = run(lambda name: None, frozenset({"a"}))
    assert table["status"].to_pylist() == ["crashed", "ok", "ok"]
    assert begun == ["b", "c"]


def test_when_every_image_fails_it_is_the_job_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="odd"):
        run(lambda name: ValueError("odd"))


def test_trouble_with_the_storage_is_no_images_fault() -> None:
    with pytest.raises(LakeError, match="down"):
        run(lambda name: LakeError("down") if name == "c" else None)


def test_the_ledger_finds_the_image_that_kills() -> None:
    ledger = Ledger()
    for number in range(1, TOGETHER_ATTEMPTS + 1):
        attempt = ledger.begin("shard")
        assert attempt is not None
        assert (attempt.number, attempt.one_by_one) == (number, False)
    for deaths in range(IMAGE_ATTEMPTS + 1):
        attempt = ledger.begin("shard")
        assert attempt is not None
        assert attempt.one_by_one
        assert attempt.given_up == ({"poison"} if deaths >= IMAGE_ATTEMPTS else set())
        ledger.begin_image("shard", "good")
        ledger.begin_image("shard", "poison")  # and the worker dies
    ledger.end_images("shard")


def test_any_number_of_images_of_a_shard_can_kill() -> None:
    ledger = Ledger()
    poison = [f"{number}" for number in range(10)]
    begun = 0
    while True:
        attempt = ledger.begin("shard")
        assert attempt is not None
        assert attempt.number <= MAX_ATTEMPTS, "the shard was given up for what its images did"
        begun += 1
        if not attempt.one_by_one:
            continue
        left = [name for name in poison if name not in attempt.given_up]
        if not left:
            break
        ledger.begin_image("shard", left[0])
    assert begun == TOGETHER_ATTEMPTS + IMAGE_ATTEMPTS * len(poison) + 1


def test_a_shard_whose_workers_die_before_any_image_is_given_up() -> None:
    ledger = Ledger()
    numbers = [attempt.number for _ in range(MAX_ATTEMPTS + 1) if (attempt := ledger.begin("shard"))]
    assert numbers[-1] > MAX_ATTEMPTS


def test_after_a_stop_nothing_is_begun() -> None:
    ledger = Ledger()
    assert ledger.begin("first") is not None
    ledger.stop()
    assert ledger.begin("second") is None
