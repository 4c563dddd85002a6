from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tinysam.lake.filesystem import LakeError, join, read_bytes, write_once
from tinysam.lake.run_record import RunRecord, check_same_run, read_run_record, redact


def make(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "job": "cache_teacher",
        "config": {"lake": "s3://lake/ü", "batch_size": 4, "tokens": 3},
        "fingerprint": "0123456789abcdef",
        "counts": {"ok": 3, "truncated": 1},
        "seconds": 2.0,
        "images_per_second": 2.0,
        "time_split": {"decode": 0.5},
        "extra": {"teacher": "demo"},
    }
    return RunRecord(**values | changes)


def test_a_record_is_read_back_as_it_was_written(storage: str) -> None:
    make().write(storage)
    assert read_run_record(storage) == make()


def test_it_says_what_ran_where() -> None:
    record = make()
    assert record.versions["python"].startswith("3.")
    assert "pyarrow" in record.versions
    assert record.machine["cpus"] >= 1
    assert record.machine["memory_bytes"] > 2**28


def test_a_folder_without_a_record_has_none(storage: str) -> None:
    assert read_run_record(storage) is None
    check_same_run(storage, "0123456789abcdef")


def test_the_same_run_goes_on(storage: str) -> None:
    make().write(storage)
    check_same_run(storage, "0123456789abcdef")


def test_another_run_is_refused_with_the_ways_out(storage: str) -> None:
    make().write(storage)
    with pytest.raises(LakeError, match=r"holds another run: cache_teacher .*another --output, or pass --overwrite"):
        check_same_run(storage, "fedcba9876543210")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b'{"job": "x"}', b"\xff"])
def test_a_damaged_record_is_explained(storage: str, content: bytes) -> None:
    write_once(join(storage, "run.json"), content)
    with pytest.raises(LakeError, match=r"run\.json is not a run record"):
        check_same_run(storage, "0123456789abcdef")


def test_fields_of_a_later_version_are_ignored(storage: str) -> None:
    values = dataclasses.asdict(make()) | {"new_field": 1}
    write_once(join(storage, "run.json"), json.dumps(values).encode())
    assert read_run_record(storage) == make()


def test_secrets_never_reach_the_file(storage: str) -> None:
    config = {
        "aws_secret_access_key": "S3CR3T",
        "nested": {"api_key": "S3CR3T", "password": "S3CR3T", "hf_token": "S3CR3T"},
        "lake": "https://me:S3CR3T@host/lake",
        "urls": ["https://host/x?X-Amz-Signature=S3CR3T"],
    }
    make(config=config).write(storage)
    text = read_bytes(join(storage, "run.json"))
    assert b"S3CR3T" not in text
    assert json.loads(text)["config"]["lake"] == "https://***@host/lake"


def test_what_only_sounds_secret_is_kept() -> None:
    values = {"token_weight": 1.0, "tokens": 3, "password": "", "key_points": "a", "path": "/a?b=c"}
    assert redact(values) == values
