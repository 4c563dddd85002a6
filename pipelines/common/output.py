"""The output folder of a shard job: ``shards/``, ``index.parquet`` and ``run.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from pipelines.common.job_config import ShardJobConfig
from pipelines.common.result import JobResult
from pipelines.common.shard_worker import COUNTS_KEY
from tinysam.lake.filesystem import exists, explained, join, list_files, open_filesystem
from tinysam.lake.index import build_index
from tinysam.lake.plan import INDEX_FILE, Shard, plan_shards, read_index, todo, write_index
from tinysam.lake.run_record import RUN_FILE, RunRecord, check_same_run
from tinysam.lake.shards import SHARDS_FOLDER, read_shard_metadata

METADATA_THREADS = 16
"""Footers of finished shards read at a time; each is one small request."""


class JobOutput:
    """What a run finds in its output and leaves there."""

    def __init__(self, job: str, config: ShardJobConfig, fingerprint: str) -> None:
        self._job, self._config, self._fingerprint = job, config, fingerprint
        self._index_url = join(config.output, INDEX_FILE)

    def plan(self) -> list[Shard]:
        """The shards of this run: from the index of an earlier run that this one continues, else from the lake.

        Raises:
            LakeError: if the output holds another run and is not to be overwritten, or a listing fails.
        """
        index = None
        if not self._config.overwrite:
            check_same_run(self._config.output, self._fingerprint)
            if exists(self._index_url):
                index = read_index(self._config.output)
        if index is None:
            index = build_index(self._config.index_config())
        return plan_shards(index, images_per_shard=self._config.images_per_shard)

    def todo(self, plan: Sequence[Shard]) -> list[Shard]:
        """The shards that the output lacks."""
        return list(plan) if self._config.overwrite else todo(plan, self._config.output)

    def begin(self, plan: Sequence[Shard], todo: Sequence[Shard]) -> None:
        """Makes the output this run's own: from here on, another run is refused and this one can be continued."""
        if self._config.overwrite:
            self._delete_results()
        if todo:
            self._write_record(JobResult(shards=len(plan), shards_before=len(plan) - len(todo)))
        if not exists(self._index_url):
            write_index(self._config.output, plan)

    def end(self, result: JobResult) -> None:
        """Records what the run did; a run that found everything done leaves the record of the run that did it."""
        if result.images or result.failures:
            self._write_record(result)

    def counts(self, done: Sequence[Shard]) -> Counter[str]:
        """Images by status in finished shards, from their footers."""
        with ThreadPoolExecutor(METADATA_THREADS) as pool:
            footers = pool.map(lambda shard: read_shard_metadata(self._shard_url(shard)), done)
            return sum((Counter(json.loads(footer[COUNTS_KEY])) for footer in footers), Counter())

    def _shard_url(self, shard: Shard) -> str:
        return join(self._config.output, SHARDS_FOLDER, f"{shard.shard_id}.parquet")

    def _delete_results(self) -> None:
        folder = self._config.output
        # run.json goes last: a deletion that is cut short still says whose results these are.
        urls = list_files(join(folder, SHARDS_FOLDER), "*.parquet")
        for url in [*urls, self._index_url, join(folder, RUN_FILE)]:
            delete(url)

    def _write_record(self, result: JobResult) -> None:
        RunRecord(
            job=self._job,
            config=asdict(self._config),
            fingerprint=self._fingerprint,
            counts=dict(sorted(result.counts.items())),
            seconds=round(result.seconds, 3),
            images_per_second=round(result.images_per_second, 3),
            time_split={stage: round(seconds, 3) for stage, seconds in result.time_split.items()},
            extra={
                "finished": result.finished,
                "shards": result.shards,
                "shards_before": result.shards_before,
                "shards_failed": len(result.failures),
                "images_this_run": result.images,
                "bytes_read": result.bytes_read,
                "num_workers": result.num_workers,
                "device": result.device,
            },
        ).write(self._config.output)


def delete(url: str) -> None:
    """Deletes a file if it is there.

    Raises:
        LakeError: if the storage refuses.
    """
    if exists(url):
        fs, path = open_filesystem(url)
        with explained(url, writing=True):
            fs.rm_file(path)
