"""One way to run a job over a lake: a fixed plan of shards, each computed by any worker and written exactly once.

The output's listing is the only record of what is done. A shard's name and content follow from the plan, so a killed
run continues where it stopped, and a retry writes the same bytes to the same place. The index is listed once and kept
in the output: a resumed run has the same plan even when the lake has changed in between.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from pipelines.common.cli import JobError, error_console
from pipelines.common.estimate import measure
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.ledger import start_ledger
from pipelines.common.metrics import JobMetrics
from pipelines.common.output import JobOutput
from pipelines.common.progress import JobProgress
from pipelines.common.ray_setup import start_ray
from pipelines.common.resources import WorkerResources, plan_workers
from pipelines.common.result import JobResult
from pipelines.common.shard_worker import Placement, ShardActor, ShardWorker, WorkOrder
from pipelines.common.stopping import TerminatedError, stopping_in_order
from pipelines.common.summary import print_dry_run, print_estimate, print_summary
from tinysam.lake import schema
from tinysam.lake.fingerprint import fingerprint
from tinysam.lake.plan import Shard

logger = logging.getLogger(__name__)

MAX_FAILED_SHARDS = 10
"""A run stops after so many failed shards, or after the first when none succeeded before it."""

SHARDS_OF_A_WORKER_AT_ONCE = 4096
"""Ray is given so many shards for each worker at a time. It keeps 7 kB for each in the driver, a gigabyte for ten
million images; and workers that start anew after 4096 shards lose no time that counts."""

STALL_SECONDS = 24 * 3600
"""How long a job waits without progress, for spot machines to come back. Ray's default gives up after 30 minutes."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A job over the shards of a lake."""

    name: str
    """Appears in the run record, in progress and in the summary."""
    config: ShardJobConfig
    """The resolved flags; a job's own flags are fields of a subclass."""
    make_worker: Callable[[Placement], ShardWorker]
    """Builds the worker; called once in each worker process, so it must pickle: a ``functools.partial`` does."""
    identity: Mapping[str, Any]
    """Everything beyond the plan that changes the results: checkpoints by content, thresholds, sizes. An output that
    was made with another identity is not continued."""

    def run(self) -> int:
        """Computes the shards that the output lacks, reports, and returns the exit code (:mod:`pipelines.common.cli`).

        A dry run starts no Ray and writes nothing.

        Raises:
            JobError: if shards failed for reasons that no image is to blame for.
            LakeError: if the lake cannot be listed or is empty, or the output cannot be written or holds another run.
            TerminatedError: after SIGTERM or this machine's notice, when what was done by then is recorded.
        """
        with tempfile.TemporaryDirectory() as scratch:
            return self._run(JobOutput(self.name, self.config, self.fingerprint(), Path(scratch)))

    def _run(self, output: JobOutput) -> int:
        plan = output.plan()
        todo = output.todo(plan)
        left = {shard.shard_id for shard in todo}
        done = [shard for shard in plan if shard.shard_id not in left]
        counts = [] if self.config.dry_run and not self.config.retry_failed else output.counts(done)
        if self.config.retry_failed:
            failed = [shard for shard, count in zip(done, counts, strict=True) if set(count) - {schema.OK}]
            counts = [count for count in counts if not set(count) - {schema.OK}]
            todo = sorted([*todo, *failed], key=lambda shard: shard.start)
        if self.config.dry_run:
            self._dry_run(plan, todo)
            return 0

        output.begin(plan, todo)
        result = JobResult(shards=len(plan), shards_before=len(plan) - len(todo))
        result.counts += sum(counts, Counter())
        if todo:
            start_ray(self.config.ray_address)
        start = time.monotonic()
        try:
            if todo:
                self._run_shards(todo, result)
            result.finished = not result.failures
        finally:
            result.seconds = time.monotonic() - start
            output.end(result)
        print_summary(self.name, self.config, result)
        if result.failures:
            raise JobError(_explain_failures(result))
        code = result.exit_code(self.config.max_error_rate)
        if code:
            error_console.print(
                f"{result.errors} of {result.total_images} images failed, more than --max-error-rate "
                f"{self.config.max_error_rate:g} allows; the column 'error' of the shards says why"
            )
        return code

    def fingerprint(self) -> str:
        """What two runs have in common whose shards may lie in one folder."""
        plan = ("lake", "annotations", "include", "exclude", "limit", "images_per_shard")
        return fingerprint(
            {
                "job": self.name,
                "schema_version": schema.SCHEMA_VERSION,
                "plan": {name: getattr(self.config, name) for name in plan},
                "identity": dict(self.identity),
            }
        )

    def _dry_run(self, plan: Sequence[Shard], todo: Sequence[Shard]) -> None:
        print_dry_run(self.name, self.config, plan, todo)
        if todo and self.config.dry_run_images:
            print_estimate(measure(self.make_worker, self.config, todo))

    def _run_shards(self, todo: Sequence[Shard], result: JobResult) -> None:
        """Computes shards and fills in ``result``.

        Raises:
            TerminatedError: after SIGTERM or a notice, when the shards in hand are written or the time for them is up.
        """
        resources = plan_workers(self.config, len(todo))
        result.num_workers, result.device = resources.num_workers, resources.placement.device
        metrics = JobMetrics(self.name)
        ledger = start_ledger()
        stopped: set[str] = set()
        try:
            with (
                JobProgress(self.name, sum(shard.num_rows for shard in todo), error_console) as progress,
                stopping_in_order(lambda: ray.get(ledger.stop.remote()), self.config.notice_board()),
                closing(self._stream(todo, resources, ledger)) as results,
            ):
                for row in results:
                    if row["stopped"]:
                        stopped.add(row["worker"])
                        if len(stopped) == resources.num_workers:
                            raise TerminatedError
                    elif row["failure"] is not None:
                        metrics.shard_failed()
                        result.failures[row["shard_id"]] = row["failure"]
                        if result.images == 0 or len(result.failures) >= MAX_FAILED_SHARDS:
                            return
                    else:
                        counts = Counter(json.loads(row["counts"]))
                        result.counts += counts
                        result.images += row["images"]
                        result.bytes_read += row["bytes_read"]
                        result.time_split.update(json.loads(row["time_split"]))
                        metrics.shard_done(counts, row["bytes_read"], row["seconds"])
                        progress.advance(counts.total(), counts)
            if stopped:
                raise TerminatedError
        finally:
            ray.kill(ledger)  # a driver may run several jobs

    def _stream(
        self, todo: Sequence[Shard], resources: WorkerResources, ledger: ray.actor.ActorHandle
    ) -> Generator[dict[str, Any]]:
        """Result rows (``shard_worker.RESULT``) in the order in which shards finish."""
        context = DataContext.get_current()
        context.target_max_block_size = None  # one shard, one block, one task
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False
        context.execution_no_progress_timeout_s = STALL_SECONDS
        order = WorkOrder(
            output=self.config.output,
            fingerprint=self.fingerprint(),
            retry_failed=self.config.retry_failed,
            notice_board=self.config.notice_board(),
        )
        at_once = SHARDS_OF_A_WORKER_AT_ONCE * resources.num_workers
        for start in range(0, len(todo), at_once):
            yield from self._stream_some(todo[start : start + at_once], resources, order, ledger)

    def _stream_some(
        self, todo: Sequence[Shard], resources: WorkerResources, order: WorkOrder, ledger: ray.actor.ActorHandle
    ) -> Generator[dict[str, Any]]:
        # from_arrow would start a task for each shard's metadata; from_items only puts its bytes into the object store.
        # The workers read the rows themselves: those of millions of images would fill the driver and the store.
        items = [{"shard_id": shard.shard_id, "start": shard.start, "num_rows": shard.num_rows} for shard in todo]
        results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ShardActor,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=resources.num_workers,
                max_tasks_in_flight_per_actor=resources.shards_in_hand,
                max_concurrent_calls_per_actor=resources.shards_in_hand,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(self.make_worker, resources.placement, order, ledger),
            num_cpus=resources.placement.num_cpus,
            num_gpus=resources.num_gpus,
        )
        try:
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from batch.to_pylist()
        except RayError as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if len(lines) < 2 else f"{lines[0]} … {lines[-1]}"
            raise JobError(f"Ray stopped the job; the same command goes on from here. {reason}") from error


def _explain_failures(result: JobResult) -> str:
    shown = list(result.failures.items())[:3]
    lines = [f"{shard_id}: {reason}" for shard_id, reason in shown]
    more = len(result.failures) - len(shown)
    if more:
        lines.append(f"… and {more} more")
    return "\n".join(
        [f"{len(result.failures)} shards failed; after a remedy, the same command goes on from here", *lines]
    )
