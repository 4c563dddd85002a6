"""Checking the output of a job: is every planned shard there, whole, and this run's own?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tinysam.lake import schema
from tinysam.lake.filesystem import LakeError, MissingError, join, list_files, redact_url, remove
from tinysam.lake.parquet_file import open_parquet
from tinysam.lake.plan import INDEX_FILE, Shard, content_hash, read_index, read_plan
from tinysam.lake.run_record import RunRecord, read_run_record
from tinysam.lake.shards import (
    COUNTS_KEY,
    FINGERPRINT_KEY,
    SCHEMA_VERSION_KEY,
    SHARDS_FOLDER,
    ShardError,
    shard_url,
)

READERS = 4
"""Shards read at a time."""

SCHEMAS: Mapping[str, pa.Schema] = {"cache_teacher": schema.EMBEDDING, "label_images": schema.MASKS}
"""What the shards of a job look like. Shards of other jobs are compared with each other."""

Kind = Literal["missing", "broken", "foreign", "index"]
_SHARD_NAME = re.compile(r"shard-\d+-[0-9a-f]{8}\.parquet")
_REMEDY = "It was damaged after it was written."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with an output."""

    kind: Kind
    """missing: a planned shard is not there. broken: a shard is there, but not as it was written. foreign: a file among
    the shards that no plan knows. index: the index itself is damaged."""
    url: str
    """The file."""
    message: str
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at, and what was found."""

    shards: int
    """Shards of the plan."""
    images: int
    """Images of the plan."""
    counts: Mapping[str, int]
    """Images by status, in the shards that are whole."""
    findings: Sequence[Finding] = field(default_factory=tuple)
    """What is wrong, missing shards first."""

    @property
    def ok(self) -> bool:
        """Whether every image of the index is in the output exactly once, as it was written."""
        return not self.findings


def verify(output_url: str, *, progress: Callable[[str, int, int | None], None] | None = None) -> Verification:
    """Reads everything that a shard job wrote, and compares it with the plan in its index.

    A shard is whole if its parquet file can be read to the end with the checksum of every page right, has the schema of
    the job and the ids of its part of the index in their order, counts its statuses right, and carries the fingerprint
    of the run. Memory is that of all ids and of a few shards.

    Args:
        output_url: Output of ``cache_teacher``, ``label_images`` or of one checkpoint of ``evaluate``.
        progress: Called with a label, how many shards are done, and how many there are.

    Raises:
        LakeError: If the folder holds no run, or the storage cannot be asked.
    """
    record = read_run_record(output_url)
    if record is None:
        raise LakeError(f"{redact_url(output_url)} holds no run: it has no run.json. Give the output folder of a job.")
    try:
        plan = read_plan(output_url)
        damaged = _check_index(output_url, plan)
    except MissingError:
        plan, damaged = [], "it is missing: the run was stopped before it began"
    except LakeError as error:
        plan, damaged = [], str(error)
    if damaged is not None:
        finding = Finding(kind="index", url=join(output_url, INDEX_FILE), message=damaged)
        return Verification(shards=0, images=0, counts={}, findings=(finding,))

    listed = list_files(join(output_url, SHARDS_FOLDER))
    names = {url.rsplit("/", 1)[-1] for url in listed}
    planned = {f"{shard.shard_id}.parquet" for shard in plan}
    findings = [
        Finding(kind="missing", url=shard_url(output_url, shard.shard_id), message="it was not written yet")
        for shard in plan
        if f"{shard.shard_id}.parquet" not in names
    ]
    findings += [
        Finding(kind="foreign", url=url, message="it is not in the plan; its images may be counted twice")
        for url in listed
        if url.rsplit("/", 1)[-1] not in planned
    ]
    present = [shard for shard in plan if f"{shard.shard_id}.parquet" in names]
    expected = SCHEMAS.get(record.job) or _first_schema(output_url, present)
    counts: Counter[str] = Counter()
    checks = _in_threads(lambda shard: _check_shard(output_url, shard, record, expected), present)
    for number, (shard, found) in enumerate(zip(present, checks, strict=True), start=1):
        if isinstance(found, str):
            findings.append(Finding(kind="broken", url=shard_url(output_url, shard.shard_id), message=found))
        else:
            counts += found
        if progress is not None:
            progress("checking shards", number, len(present))
    images = sum(shard.num_rows for shard in plan)
    return Verification(shards=len(plan), images=images, counts=dict(counts), findings=tuple(findings))


def repair(verification: Verification) -> list[str]:
    """Deletes what is broken, so that the job's next run makes it again, and shards that no plan knows.

    Files among the shards whose names are not those of shards are somebody's, and stay.

    Returns:
        The URLs of what was deleted.

    Raises:
        LakeError: If the storage refuses.
    """
    deleted = []
    for finding in verification.findings:
        is_shard = _SHARD_NAME.fullmatch(finding.url.rsplit("/", 1)[-1]) is not None
        if finding.kind in ("broken", "index") or (finding.kind == "foreign" and is_shard):
            remove(finding.url)
            deleted.append(finding.url)
    return deleted


def _check_index(output_url: str, plan: Sequence[Shard]) -> str | None:
    """What is wrong with an index; None if nothing is."""
    ids = read_index(output_url, ["image_id"]).column("image_id")
    if pc.count_distinct(ids).as_py() != len(ids):
        return "an image is in it twice"
    for shard in plan:
        if not shard.shard_id.endswith(content_hash(shard.rows)):
            return f"the rows of {shard.shard_id} are not those that gave it its name"
    return None


def _first_schema(output_url: str, shards: Sequence[Shard]) -> pa.Schema | None:
    for shard in shards:
        try:
            with open_parquet(shard_url(output_url, shard.shard_id), remedy=_REMEDY, error_type=ShardError) as parquet:
                return parquet.schema_arrow
        except ShardError:
            continue  # _check_shard says so
    return None


def _check_shard(output_url: str, shard: Shard, record: RunRecord, expected: pa.Schema | None) -> Counter[str] | str:
    """The shard's images by status, or what is wrong with it."""
    url = shard_url(output_url, shard.shard_id)
    ids: list[str] = []
    counts: Counter[str] = Counter()
    try:
        with open_parquet(url, remedy=_REMEDY, whole=True, error_type=ShardError) as parquet:
            metadata = {key.decode(): value.decode() for key, value in (parquet.schema_arrow.metadata or {}).items()}
            if expected is not None and not parquet.schema_arrow.equals(expected):
                return f"its columns are not those of {record.job}"
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group)
                ids += rows.column("image_id").to_pylist()
                counts.update(rows.column("status").to_pylist())
    except ShardError as error:
        return str(error)
    return _first_mismatch(shard, ids, counts, metadata, record) or counts


def _first_mismatch(
    shard: Shard, ids: Sequence[str], counts: Counter[str], metadata: Mapping[str, str], record: RunRecord
) -> str | None:
    if len(ids) != shard.num_rows:
        return f"it has {len(ids)} rows, and {shard.num_rows} were planned"
    if len(set(ids)) < len(ids):
        return "an image is in it twice"
    if list(ids) != shard.rows["image_id"].to_pylist():
        return "its images are not those that were planned"
    facts: list[tuple[str, Any, Any]] = [
        ("fingerprint", metadata.get(FINGERPRINT_KEY), record.fingerprint),
        ("schema version", metadata.get(SCHEMA_VERSION_KEY), str(schema.SCHEMA_VERSION)),
        ("count of statuses", _parsed(metadata.get(COUNTS_KEY)), dict(counts)),
    ]
    for name, found, wanted in facts:
        if found != wanted:
            return f"its {name} is {found}, not {wanted}"
    return None


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def _in_threads(check: Callable[[Shard], Counter[str] | str], shards: Sequence[Shard]) -> Iterator[Counter[str] | str]:
    """``map`` in order by a few threads, without a list of all that is still to do."""
    remaining = iter(shards)
    with ThreadPoolExecutor(READERS) as pool:
        waiting = [pool.submit(check, shard) for shard in islice(remaining, 2 * READERS)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(check, shard) for shard in islice(remaining, 1)]
