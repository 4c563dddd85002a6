"""The output folder of a shard job: ``shards/``, ``index.parquet`` and ``run.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from pipelines.common.job_config import ShardJobConfig
from pipelines.common.result import JobResult
from tinysam.lake.filesystem import exists, join, list_files, remove
from tinysam.lake.index import iter_index
from tinysam.lake.plan import INDEX_FILE, Shard, extend_plan, read_plan, todo, write_index, write_plan
from tinysam.lake.run_record import RUN_FILE, RunRecord, check_same_run
from tinysam.lake.shards import COUNTS_KEY, SHARDS_FOLDER, read_shard_metadata, shard_url

METADATA_THREADS = 32
"""Footers of finished shards read at a time; each is one small request."""


class JobOutput:
    """What a run finds in its output and leaves there."""

    def __init__(self, job: str, config: ShardJobConfig, fingerprint: str, scratch: Path) -> None:
        """``scratch`` is an empty local folder, in which a new plan lies until the run begins."""
        self._job, self._config, self._fingerprint, self._scratch = job, config, fingerprint, scratch
        self._index_url = join(config.output, INDEX_FILE)
        self._index_changed = False

    def plan(self) -> list[Shard]:
        """The shards of this run: from the index of an earlier run that this one continues, else from the lake.

        With ``--update``, images that the lake has gained since are shards at its end.

        Raises:
            LakeError: if the output holds another run and is not to be overwritten, or a listing fails.
        """
        plan: list[Shard] = []
        if not self._config.overwrite:
            check_same_run(self._config.output, self._fingerprint)
            if exists(self._index_url):
                plan = read_plan(self._config.output)
        if plan and not self._config.update:
            return plan
        lake = iter_index(self._config.index_config())
        size = self._config.images_per_shard
        if plan:
            planned = extend_plan(plan, self._scratch, lake, images_per_shard=size)
        else:
            planned = write_plan(self._scratch, lake, images_per_shard=size)
        self._index_changed = len(planned) > len(plan)
        return planned

    def todo(self, plan: Sequence[Shard]) -> list[Shard]:
        """The shards that the output lacks."""
        return list(plan) if self._config.overwrite else todo(plan, self._config.output)

    def begin(self, plan: Sequence[Shard], todo: Sequence[Shard]) -> None:
        """Makes the output this run's own: from here on, another run is refused and this one can be continued."""
        if self._config.overwrite:
            self._delete_results()
        if todo:
            self._write_record(JobResult(shards=len(plan), shards_before=len(plan) - len(todo)))
        if self._index_changed:
            write_index(self._config.output, plan)

    def end(self, result: JobResult) -> None:
        """Records what the run did; a run that found everything done leaves the record of the run that did it."""
        if result.images or result.failures:
            self._write_record(result)

    def counts(self, done: Sequence[Shard]) -> list[Counter[str]]:
        """Images by status in each of some finished shards, from their footers."""
        urls = [shard_url(self._config.output, shard.shard_id) for shard in done]
        with ThreadPoolExecutor(METADATA_THREADS) as pool:
            return [Counter(json.loads(footer[COUNTS_KEY])) for footer in pool.map(read_shard_metadata, urls)]

    def _delete_results(self) -> None:
        folder = self._config.output
        # run.json goes last: a deletion that is cut short still says whose results these are.
        urls = list_files(join(folder, SHARDS_FOLDER), "*.parquet")
        for url in [*urls, self._index_url, join(folder, RUN_FILE)]:
            remove(url)

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
