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

from pipelines.common.cli import EXIT_OK, JobError, error_console
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
        """``run_jobs`` for this job alone: the same errors, and its exit code."""
        [code] = run_jobs(self.name, [self])
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

    def report_dry_run(self, plan: Sequence[Shard], todo: Sequence[Shard]) -> None:
        """Says what a run would do, and how long it would take where that is asked for."""
        print_dry_run(self.name, self.config, plan, todo)
        if todo and self.config.dry_run_images:
            print_estimate(measure(self.make_worker, self.config, todo))

    def order(self) -> WorkOrder:
        """What the workers are told of this job."""
        return WorkOrder(
            make_worker=self.make_worker,
            output=self.config.output,
            fingerprint=self.fingerprint(),
            retry_failed=self.config.retry_failed,
            notice_board=self.config.notice_board(),
        )


@dataclass(kw_only=True)
class _Run:
    """A job on its way."""

    job: ShardJob
    output: JobOutput
    plan: list[Shard]
    todo: list[Shard]
    left: set[str]
    """Of ``todo``, by id, what has not been written yet."""
    result: JobResult


def run_jobs(name: str, jobs: Sequence[ShardJob]) -> list[int]:
    """Computes the shards that the jobs' outputs lack and reports.

    The jobs come one after the other on the same workers, which start once. A dry run starts no Ray and writes nothing.

    Args:
        name: of all together, in the progress.
        jobs: one at least; their ``config`` differs in ``output`` alone.

    Returns:
        Each job's exit code (:mod:`pipelines.common.cli`).

    Raises:
        JobError: if shards failed for reasons that no image is to blame for.
        LakeError: if the lake cannot be listed or is empty, or an output cannot be written or holds another run.
        TerminatedError: after SIGTERM or this machine's notice, when what was done by then is recorded.
    """
    config = jobs[0].config
    with tempfile.TemporaryDirectory() as scratch:
        runs = [_planned(job, Path(tempfile.mkdtemp(dir=scratch))) for job in jobs]
        if config.dry_run:
            for run in runs:
                run.job.report_dry_run(run.plan, run.todo)
            return [EXIT_OK] * len(runs)
        for run in runs:
            run.output.begin(run.plan, run.todo)
        try:
            if any(run.todo for run in runs):
                start_ray(config.ray_address)
                _run_shards(name, runs)
        finally:
            for run in runs:
                run.result.finished = not run.left
                run.output.end(run.result)
    for run in runs:
        print_summary(run.job.name, run.job.config, run.result)
    if failures := [_explain_failures(run.result) for run in runs if run.result.failures]:
        raise JobError("\n".join(failures))
    return [_exit_code(run.result, config.max_error_rate) for run in runs]


def _planned(job: ShardJob, scratch: Path) -> _Run:
    """What there is to do; ``scratch`` is an empty folder."""
    output = JobOutput(job.name, job.config, job.fingerprint(), scratch)
    plan = output.plan()
    todo = output.todo(plan)
    missing = {shard.shard_id for shard in todo}
    done = [shard for shard in plan if shard.shard_id not in missing]
    counts = [] if job.config.dry_run and not job.config.retry_failed else output.counts(done)
    if job.config.retry_failed:
        failed = [shard for shard, count in zip(done, counts, strict=True) if set(count) - {schema.OK}]
        counts = [count for count in counts if not set(count) - {schema.OK}]
        todo = sorted([*todo, *failed], key=lambda shard: shard.start)
    result = JobResult(shards=len(plan), shards_before=len(plan) - len(todo))
    result.counts += sum(counts, Counter())
    return _Run(job=job, output=output, plan=plan, todo=todo, left={shard.shard_id for shard in todo}, result=result)


def _run_shards(name: str, runs: Sequence[_Run]) -> None:
    """Computes the shards to do and fills in the results.

    Raises:
        TerminatedError: after SIGTERM or a notice, when the shards in hand are written or the time for them is up.
    """
    config = runs[0].job.config
    resources = plan_workers(config, sum(len(run.todo) for run in runs))
    for run in runs:
        run.result.num_workers, run.result.device = resources.num_workers, resources.placement.device
    metrics = [JobMetrics(run.job.name) for run in runs]
    images = sum(shard.num_rows for run in runs for shard in run.todo)
    ledger = start_ledger()
    stopped: set[str] = set()
    last = time.monotonic()
    try:
        with (
            JobProgress(name, images, error_console) as progress,
            stopping_in_order(lambda: ray.get(ledger.stop.remote()), config.notice_board()),
            closing(_stream(runs, resources, ledger)) as rows,
        ):
            for row in rows:
                run, metric = runs[row["job"]], metrics[row["job"]]
                last, before = time.monotonic(), last
                run.result.seconds += last - before
                if row["stopped"]:
                    stopped.add(row["worker"])
                    if len(stopped) == resources.num_workers:
                        raise TerminatedError
                elif row["failure"] is not None:
                    metric.shard_failed()
                    run.result.failures[row["shard_id"]] = row["failure"]
                    if run.result.images == 0 or len(run.result.failures) >= MAX_FAILED_SHARDS:
                        return
                else:
                    counts = Counter(json.loads(row["counts"]))
                    run.left.discard(row["shard_id"])
                    run.result.counts += counts
                    run.result.images += row["images"]
                    run.result.bytes_read += row["bytes_read"]
                    run.result.time_split.update(json.loads(row["time_split"]))
                    metric.shard_done(counts, row["bytes_read"], row["seconds"])
                    progress.advance(counts.total(), counts)
        if stopped:
            raise TerminatedError
    finally:
        ray.kill(ledger)  # a driver may run several jobs


def _stream(
    runs: Sequence[_Run], resources: WorkerResources, ledger: ray.actor.ActorHandle
) -> Generator[dict[str, Any]]:
    """Result rows (``shard_worker.RESULT``) in the order in which shards finish."""
    context = DataContext.get_current()
    context.target_max_block_size = None  # one shard, one block, one task
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = STALL_SECONDS
    orders = [run.job.order() for run in runs]
    todo = [(number, shard) for number, run in enumerate(runs) for shard in run.todo]
    at_once = SHARDS_OF_A_WORKER_AT_ONCE * resources.num_workers
    for start in range(0, len(todo), at_once):
        yield from _stream_some(todo[start : start + at_once], resources, orders, ledger)


def _stream_some(
    todo: Sequence[tuple[int, Shard]],
    resources: WorkerResources,
    orders: Sequence[WorkOrder],
    ledger: ray.actor.ActorHandle,
) -> Generator[dict[str, Any]]:
    """The same of some shards, each with its job's number."""
    # from_arrow would start a task for each shard's metadata; from_items only puts its bytes into the object store.
    # The workers read the rows themselves: those of millions of images would fill the driver and the store.
    items = [
        {"job": number, "shard_id": shard.shard_id, "start": shard.start, "num_rows": shard.num_rows}
        for number, shard in todo
    ]
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
        fn_constructor_args=(orders, resources.placement, ledger),
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


def _exit_code(result: JobResult, max_error_rate: float) -> int:
    code = result.exit_code(max_error_rate)
    if code:
        error_console.print(
            f"{result.errors} of {result.total_images} images failed, more than --max-error-rate "
            f"{max_error_rate:g} allows; the column 'error' of the shards says why"
        )
    return code


def _explain_failures(result: JobResult) -> str:
    shown = list(result.failures.items())[:3]
    lines = [f"{shard_id}: {reason}" for shard_id, reason in shown]
    more = len(result.failures) - len(shown)
    if more:
        lines.append(f"… and {more} more")
    return "\n".join(
        [f"{len(result.failures)} shards failed; after a remedy, the same command goes on from here", *lines]
    )
