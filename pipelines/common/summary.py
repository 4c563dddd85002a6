"""The tables that a job prints before and after it runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipelines.common.cli import console
from pipelines.common.estimate import Estimate
from pipelines.common.job_config import ShardJobConfig
from pipelines.common.result import JobResult
from tinysam.lake.plan import Shard


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_dry_run(name: str, config: ShardJobConfig, plan: Sequence[Shard], todo: Sequence[Shard]) -> None:
    """Says what a run would do."""
    table = Table("", "images", "shards", "size", title=f"{name}: dry run, nothing was written to {config.output}")
    left = {shard.shard_id for shard in todo}
    done = [shard for shard in plan if shard.shard_id not in left]
    for label, shards in (("to do", todo), ("done", done), ("all", plan)):
        size = human_bytes(sum(shard.num_bytes for shard in shards))
        if not all(shard.sized for shard in shards):
            size = f"at least {size}"
        table.add_row(label, str(sum(shard.num_rows for shard in shards)), str(len(shards)), size)
    console.print(table)


def print_estimate(estimate: Estimate) -> None:
    """Says how long a run would take, as measured on a sample."""
    images, seconds = estimate.images, estimate.seconds
    table = Table(show_header=False, title=f"estimate from {estimate.sample} images on this machine")
    table.add_row("one image", f"{estimate.seconds_per_image:.3f} s on one worker ({estimate.device})")
    table.add_row("all to do", f"{images} images, {seconds / 3600:.2f} h with --num-workers {estimate.num_workers}")
    table.add_row("paid for", f"{estimate.worker_hours:.2f} worker-hours, {estimate.gpu_hours:.2f} GPU-hours")
    table.add_row("loading", f"{estimate.load_seconds:.1f} s a worker, once")
    table.add_row("output", f"about {human_bytes(estimate.bytes_out)}")
    console.print(table)


def print_summary(name: str, config: ShardJobConfig, result: JobResult) -> None:
    """Says what a run did and where the time went."""
    table = Table(show_header=False, title=f"{name}: {config.output}")
    table.add_row("images", f"{result.total_images} in {result.shards} shards")
    if result.shards_before:
        table.add_row("done before", f"{result.shards_before} shards")
    for status, count in result.counts.most_common():
        table.add_row(f"  {status}", str(count))
    if result.failures:
        table.add_row("[red]failed shards[/]", str(len(result.failures)))
    if result.images:
        speed = f"{result.images_per_second:.2f} images/s, {human_bytes(result.bytes_read / result.seconds)}/s read"
        table.add_row("this run", f"{result.images} images in {result.seconds:.1f} s: {speed}")
        table.add_row("workers", f"{result.num_workers} on {result.device}")
        total = sum(result.time_split.values())
        for stage, seconds in result.time_split.most_common():
            table.add_row(f"  {stage}", f"{seconds:.1f} s ({seconds / max(total, 1e-9):.0%})")
    console.print(table)
